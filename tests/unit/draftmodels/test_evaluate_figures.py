"""From answers to figures, against sums done by hand; prompts; records in manifests."""

import json
from pathlib import Path

import pytest

from paceline.draftmodels.evaluate.answers import Answer, Block, Pass
from paceline.draftmodels.evaluate.figures import Measured, acceptance, expected_tokens, summarize
from paceline.draftmodels.evaluate.prompts import BUILT_IN, NO_CATEGORY, dataset, read, tokenize
from paceline.server.errors import ConfigError, InvalidRequestError

#: Two blocks: 1 of 3 accepted (two positions examined), and 2 of 2 (both examined).
BLOCKS = (Block("d", 3, 1, (0.9, 0.3)), Block("d", 2, 2, (0.8, 0.6)))


def answer(category: str, tokens: int, forwards: int, seconds: float = 1.0, blocks: tuple[Block, ...] = ()) -> Answer:
    return Answer(0, category, tuple(range(tokens)), forwards, seconds, blocks)


def test_acceptance_by_hand() -> None:
    # The prompt's forward and one that drafted nothing commit a token each, the blocks 1 + 1 and 2 + 1.
    found = acceptance([answer("a", 1 + 1 + 2 + 3, 3, blocks=BLOCKS)], 3)

    assert found.alpha == pytest.approx((0.9 + 0.3 + 0.8 + 0.6) / 4)
    assert found.alpha_per_position == (2 / 2, 1 / 2, None)
    assert found.overlap_per_position == pytest.approx((0.85, 0.45, None))
    assert found.examined_per_position == (2, 2, 0)
    assert found.acceptance_histogram == (0, 1, 1, 0)
    assert (found.num_spec_steps, found.num_draft_tokens, found.num_accepted_draft_tokens) == (2, 5, 3)
    assert found.draft_acceptance_rate == 3 / 5
    assert found.tau == 6 / 3
    a = 0.65
    assert found.tau_formula == pytest.approx(((1 + a + a**2 + a**3) + (1 + a + a**2) + 1) / 3)


def test_nothing_drafted_leaves_no_rate_and_tau_one() -> None:
    found = acceptance([answer("a", 5, 4)], 2)
    assert (found.alpha, found.draft_acceptance_rate, found.tau_formula) == (None, None, None)
    assert (found.tau, found.alpha_per_position, found.acceptance_histogram) == (1.0, (None, None), (0, 0, 0))
    assert acceptance([answer("a", 1, 0)], 2).tau is None


def test_unknown_overlaps_leave_the_counts() -> None:
    found = acceptance([answer("a", 7, 3, blocks=(Block("d", 3, 1), Block("d", 2, 2)))], 3)
    assert (found.alpha, found.tau_formula, found.overlap_per_position) == (None, None, (None, None, None))
    assert found.alpha_per_position == (1.0, 0.5, None)


def test_the_formula() -> None:
    assert expected_tokens(0.0, 4) == 1.0
    assert expected_tokens(1.0, 4) == 5.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)


def test_speed_is_the_median_over_rounds_of_paired_ratios_per_category_and_in_total() -> None:
    def one(seconds: float, per_answer: float) -> Pass:
        return Pass((answer("a", 10, 9, per_answer), answer("b", 30, 29, 2 * per_answer)), seconds)

    examined = Pass((answer("a", 10, 9), answer("b", 30, 29)), 1.0)
    rounds = ((one(2, 1), one(4, 1.5)), (one(1, 1), one(4, 4.0)), (one(2, 1), one(2, 2.0)))
    result = summarize(Measured(0.0, examined, rounds), 2, seeded=False)

    total = result.total.speed
    assert total is not None
    assert total.rounds == ((20.0, 10.0), (40.0, 10.0), (20.0, 20.0))
    assert (total.tokens_per_second, total.tokens_per_second_without, total.speedup) == (20.0, 10.0, 2.0)
    assert list(result.categories) == ["a", "b"]
    category = result.categories["a"].speed
    assert category is not None
    assert category.rounds == ((10.0, pytest.approx(10 / 1.5)), (10.0, 2.5), (10.0, 5.0))
    assert category.speedup == 2.0
    assert result.same_text == (2, 2)


def test_equal_texts_are_compared_only_where_they_must_be_equal() -> None:
    on, off = Pass((answer("a", 5, 4), answer("a", 6, 5)), 1.0), Pass((answer("a", 5, 4), answer("a", 7, 6)), 1.0)
    for temperature, seeded, expected in ((0.0, False, (1, 2)), (1.0, True, (1, 2)), (1.0, False, None)):
        assert summarize(Measured(temperature, on, ((on, off),)), 2, seeded=seeded).same_text == expected
    assert summarize(Measured(0.0, on, ()), 2, seeded=False).same_text is None
    assert summarize(Measured(0.0, on, ()), 2, seeded=False).total.speed is None


def test_the_built_in_set_has_six_categories_of_eight_that_take_turns() -> None:
    prompts = read(BUILT_IN)
    assert len(prompts) == 48
    assert len({str(p.messages) for p in prompts}) == 48
    assert len({p.category for p in prompts[:6]}) == 6
    assert [p.category for p in prompts[6:12]] == [p.category for p in prompts[:6]]
    assert read(BUILT_IN, 4) == prompts[:4]
    lengths = [len(str(p.messages[0]["content"])) for p in prompts]
    assert max(lengths) > 5 * min(lengths)


def test_files_of_text_and_of_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("the first\n\nthe second\n")
    assert [p.messages[0]["content"] for p in read(str(text))] == ["the first", "the second"]
    assert {p.category for p in read(str(text))} == {NO_CATEGORY}
    records = tmp_path / "some.jsonl"
    turns = [{"role": "system", "content": "short"}, {"role": "user", "content": "the"}]
    records.write_text(json.dumps({"messages": turns, "category": "c", "id": 3}) + "\n" + '{"prompt": "it"}\n')
    first, second = read(str(records))
    assert (list(first.messages), first.category, first.where) == (turns, "c", f"{records}:1")
    assert second.messages[0] == {"role": "user", "content": "it"}
    assert dataset(str(records)) == "some.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", "holds no prompts"),
        ("{\n", ":1: not valid JSON"),
        ('{"prompt": "a"}\n{"text": "a"}\n', ':2: needs exactly one of "prompt" and "messages"'),
        ('{"prompt": "a", "messages": []}\n', ":1: needs exactly one"),
        ('{"prompt": ""}\n', '"prompt" is not a text'),
        ('{"prompt": "a", "category": 3}\n', '"category" is not a text'),
        ('{"messages": []}\n', '"messages" is not a list'),
        ('{"messages": [{"role": "user"}]}\n', "a message is not an object"),
    ],
)
def test_bad_files_are_told_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(str(tmp_path / "none.jsonl"))


class Plain:
    has_chat_template = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(self, messages: object, *, add_generation_prompt: bool = True) -> list[int]:
        raise InvalidRequestError("no system role here")


class Refusing(Plain):
    has_chat_template = True


def test_tokens_without_a_chat_template_and_a_template_that_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab\n")
    raw = read(str(path))
    assert tokenize(raw, Plain())[0].tokens == (97, 98)
    with pytest.raises(ConfigError, match=r"a\.txt:1: no system role here"):
        tokenize(raw, Refusing())
