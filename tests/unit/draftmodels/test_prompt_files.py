"""Prompts from files: template, answers with their end, categories, errors with line numbers, the held-out split."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from paceline.draftmodels.data.prompts import Prompt, read_prompts, split_held_out
from paceline.draftmodels.data.seeds import derive_seed, epoch_order
from paceline.draftmodels.data.templates import end_of_answer, end_of_turn, user_turn
from paceline.server.errors import DataError
from paceline.server.models.tokenizer import HfTokenizer


@pytest.fixture
def tokenizer() -> HfTokenizer:
    renderer = tiny.tiny_tokenizer()
    return HfTokenizer(renderer.backend_tokenizer, renderer, frozenset({tiny.EOS_ID}))


@pytest.fixture
def plain() -> HfTokenizer:
    """A base model's: no chat template."""
    renderer = tiny.tiny_tokenizer()
    renderer.chat_template = None
    return HfTokenizer(renderer.backend_tokenizer, renderer, frozenset({tiny.EOS_ID}))


def written(folder: Path, *entries: Any, name: str = "p.jsonl") -> Path:
    path = folder / name
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_prompt_is_a_users_message(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    path = written(tmp_path, {"prompt": "hi there", "id": 7}, "", {"prompt": "x", "category": "code"})
    first, second = read_prompts(path, tokenizer)
    assert tokenizer.decode(first.tokens, skip_special_tokens=False) == (
        "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.answer, first.category, second.category) == (None, "all", "code")


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "hi"}], "answer": "yes"},
        {"prompt": "hi", "answer": "yes"},
        {"prompt": "hi", "completion": "yes"},
    ],
)
def test_an_answer_ends_as_the_target_would_end_it(
    entry: dict[str, Any], tmp_path: Path, tokenizer: HfTokenizer
) -> None:
    (prompt,) = read_prompts(written(tmp_path, entry), tokenizer)
    sequence = prompt.with_answer()
    assert tokenizer.decode(sequence.tokens, skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert tokenizer.decode(sequence.answer) == "yes"


def test_without_a_template_a_prompt_is_the_text(tmp_path: Path, plain: HfTokenizer) -> None:
    (prompt,) = read_prompts(written(tmp_path, {"prompt": "hi", "completion": " ho"}), plain)
    assert plain.decode(prompt.with_answer().tokens, skip_special_tokens=False) == "hi ho<|im_end|>"
    with pytest.raises(DataError, match=r"p\.jsonl:1: the target has no chat template"):
        read_prompts(written(tmp_path, {"messages": [{"role": "user", "content": "x"}]}), plain)


def test_other_files_hold_a_prompt_per_line(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    prompts = read_prompts(written(tmp_path, "one", "", "  two", name="p.txt"), tokenizer)
    assert ["two" in tokenizer.decode(p.tokens) for p in prompts] == [False, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ("{}", "either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": " "}', "prompt must be a text"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"prompt": "a", "answer": "b", "completion": "c"}', "answer and completion"),
        ('{"prompt": "a", "answer": ["b"]}', "answer must be a text"),
        ('{"prompt": "a", "category": 1}', "category must be a text"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing that it answers"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "z"}',
            "cannot be another one",
        ),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path, tokenizer: HfTokenizer) -> None:
    path = written(tmp_path, {"prompt": "good"}, "", line)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_or_empty_are_refused(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"bytes\.txt:2: not UTF-8"):
        read_prompts(tmp_path / "bytes.txt", tokenizer)
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(written(tmp_path, "", name="empty.txt"), tokenizer)
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(tmp_path / "missing.txt", tokenizer)


def test_what_surrounds_the_users_words(tokenizer: HfTokenizer, plain: HfTokenizer) -> None:
    turn = user_turn(tokenizer)
    assert tokenizer.decode(turn.before, skip_special_tokens=False) == "<|im_start|>user\n"
    assert tokenizer.decode(turn.after, skip_special_tokens=False) == "<|im_end|>\n"
    assert end_of_turn(tokenizer) == tiny.EOS_ID
    assert end_of_turn(plain) is None
    assert end_of_answer(plain) == (tiny.EOS_ID,)


def some(count: int) -> list[Prompt]:
    return [Prompt((i, i + 1)) for i in range(count)]


def test_held_out_prompts_are_a_function_of_the_seed_and_of_no_other_prompt() -> None:
    prompts = some(50)
    train, held = split_held_out(prompts, 10, seed=1)
    assert len(held) == 10
    assert sorted(train + held, key=lambda p: p.tokens) == prompts
    assert (train, held) == split_held_out(prompts, 10, seed=1)
    assert held != split_held_out(prompts, 10, seed=2)[1]
    assert set(split_held_out(prompts[::-1], 10, seed=1)[1]) == set(held)


def test_equal_prompts_are_on_one_side() -> None:
    twice = some(20) + [Prompt(p.tokens, category="again") for p in some(20)]
    train, held = split_held_out(twice, 6, seed=0)
    assert len(held) == 6
    assert len(train) == 28
    assert not {p.tokens for p in train} & {p.tokens for p in held}
    with pytest.raises(DataError, match="hold out 20 of 20"):
        split_held_out(twice, 20, seed=0)


def test_order_is_a_permutation_of_its_own_per_seed_and_epoch() -> None:
    orders = [epoch_order(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(100, 0, 1) == orders[1]
    assert epoch_order(5, 7, 3) == [
        1,
        0,
        3,
        2,
        4,
    ]  # whatever machine or library: a job can be resumed anywhere


def test_derived_seeds_tell_words_apart() -> None:
    seeds = {derive_seed(0, 1, 23), derive_seed(0, 12, 3), derive_seed(0, "1", 23), derive_seed(1, 1, 23)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
