"""Files of texts and conversations: what is read, cut, left out and refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.draftmodels.data.documents import read_documents, sequences_of
from paceline.draftmodels.data.prompts import read_prompts, split_held_out
from paceline.server.errors import DataError
from paceline.server.models.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(target: Path) -> Any:
    return load_tokenizer(target)


def write(folder: Path, *entries: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries)
    )
    return path


def test_texts_are_cut_and_conversations_keep_their_prompt(tmp_path: Path, tokenizer: Any) -> None:
    text = "a text that is longer than one sequence"
    path = write(tmp_path, {"text": text}, {"prompt": "here", "answer": "an answer"})
    (cut,) = read_documents(path, tokenizer, 12)  # the other's chat template alone takes more
    ids = tokenizer.encode(text)
    assert cut.tokens == tuple(ids)
    assert [len(s.tokens) for s in cut.sequences] == [12] * (len(ids) // 12) + [len(ids) % 12]
    assert [token for s in cut.sequences for token in s.tokens] == ids
    assert {s.prompt_tokens for s in cut.sequences} == {1}
    (only,) = read_documents(write(tmp_path, {"prompt": "here", "answer": "an answer"}), tokenizer, 64)
    (prompt,) = read_prompts(write(tmp_path, {"prompt": "here", "answer": "an answer"}), tokenizer)
    assert only.sequences == (prompt.with_answer(),)
    assert only.tokens == prompt.tokens
    room = len(prompt.tokens) + 2
    (short,) = read_documents(write(tmp_path, {"prompt": "here", "answer": "an answer"}), tokenizer, room)
    assert [s.answer for s in short.sequences] == [prompt.with_answer().answer[:2]]


def test_plain_text_has_a_text_per_line(tmp_path: Path, tokenizer: Any) -> None:
    documents = read_documents(write(tmp_path, "one text", "", "another", name="a.txt"), tokenizer, 64)
    assert [tokenizer.decode(s.tokens) for s in sequences_of(documents)] == ["one text", "another"]


def test_all_pieces_of_a_text_are_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, *({"text": f"text {i} with a number of words"} for i in range(6)))
    documents = read_documents(path, tokenizer, 8)
    training, held_out = split_held_out(documents, 2, seed=3)
    assert len(held_out) == 2
    assert len(training) == 4
    assert all(len(document.sequences) > 1 for document in held_out)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["{"], "data.jsonl:1: not JSON"),
        ([{"text": "a text"}, {"prompt": "x"}], "data.jsonl:2: has no answer"),
        ([{"text": "x", "prompt": "y"}], "has both text and a prompt"),
        ([{"text": " "}], "text must be a text that is not empty"),
        ([{"word": "x"}], "must have either prompt or messages"),
        ([{"text": "a"}], "nothing to learn from"),
        ([], "nothing to learn from"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, tokenizer: Any, entries: list[Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        read_documents(write(tmp_path, *entries), tokenizer, 32)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
