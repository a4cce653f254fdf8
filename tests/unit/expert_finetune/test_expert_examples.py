"""Lines of prompts and answers, and conversations, as sequences: template, end of answer, where the loss is, errors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import TinyCheckpoint

from paceline.draftmodels.data.documents import Document
from paceline.draftmodels.data.prompts import Template
from paceline.draftmodels.expert_finetune.examples import Reader
from paceline.server.errors import ConfigError, DataError
from paceline.server.models.tokenizer import HfTokenizer, load_tokenizer

ASKED: dict[str, Any] = {"prompt": "red 1", "answer": "hot"}


@pytest.fixture
def tokenizer(target: Path) -> HfTokenizer:
    return load_tokenizer(target)


@pytest.fixture
def without_template(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> HfTokenizer:
    folder = tmp_path / "plain"
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tiny.EOS_ID}))
    return load_tokenizer(folder)


def read(
    tmp_path: Path,
    tokenizer: HfTokenizer,
    *lines: Mapping[str, Any] | str,
    template: Template = "auto",
    longest: int = 200,
) -> list[Document]:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return Reader(tokenizer, longest, template).read(path)


def shown(document: Document, tokenizer: HfTokenizer) -> list[tuple[str, str]]:
    """(prompt, answer) of each sequence, control tokens included."""
    return [
        (
            tokenizer.decode(s.tokens[: s.prompt_tokens], skip_special_tokens=False),
            tokenizer.decode(s.answer, skip_special_tokens=False),
        )
        for s in document.sequences
    ]


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_a_prompt_is_a_users_message_and_its_answer_ends_the_turn(
    tmp_path: Path, tokenizer: HfTokenizer, template: Template
) -> None:
    (document,) = read(tmp_path, tokenizer, ASKED, template=template)
    prompt = "<|im_start|>user\nred 1<|im_end|>\n<|im_start|>assistant\n"
    assert shown(document, tokenizer) == [(prompt, "hot<|im_end|>")]
    assert document.sequences[0].tokens[-1] == tiny.EOS_ID


def test_plain_is_the_text_itself_also_where_there_is_a_template(
    tmp_path: Path, tokenizer: HfTokenizer, without_template: HfTokenizer
) -> None:
    (asked,) = read(tmp_path, tokenizer, ASKED, template="plain")
    assert shown(asked, tokenizer) == [("red 1", "hot<|im_end|>")]
    (by_itself,) = read(tmp_path, without_template, ASKED)
    assert by_itself.sequences == asked.sequences


def test_every_turn_of_the_assistant_is_learnt(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    said = [
        ("system", "be brief"),
        ("user", "red"),
        ("assistant", "hot"),
        ("user", "ice"),
        ("assistant", "no"),
    ]
    messages = [{"role": role, "content": content} for role, content in said]
    (document,) = read(tmp_path, tokenizer, {"messages": messages})
    first, second = shown(document, tokenizer)
    before = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first == (before, "hot<|im_end|>")
    assert second == (
        f"{before}hot<|im_end|>\n<|im_start|>user\nice<|im_end|>\n<|im_start|>assistant\n",
        "no<|im_end|>",
    )


BAD = [
    ("not json", "not JSON"),
    ('["a"]', "must be an object"),
    ({"prompt": "a"}, "has no answer to learn from"),
    ({"answer": "a"}, "must have either prompt or messages"),
    ({"prompt": "a", "answer": 3}, "answer must be a text"),
    ({"prompt": " ", "answer": "b"}, "prompt must be a text"),
    ({"text": "only text"}, "must have either prompt or messages"),
    ({"messages": []}, "messages must be a list of objects"),
    ({"messages": ["hello"]}, "messages must be a list of objects"),
    ({"messages": [{"role": "user", "content": "a"}]}, "must end with the assistant's answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing that it answers"),
    ('{"prompt": "\\ud800", "answer": "b"}', "half a surrogate"),
    ('{"prompt": "a", "answer": "\\ud800"}', "half a surrogate"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_a_bad_line_is_named_with_its_file_and_number(
    tmp_path: Path, tokenizer: HfTokenizer, line: Any, words: str
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, tokenizer, ASKED, "", line)
    assert f"{tmp_path / 'lines.jsonl'}:3: " in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_messages_need_the_template(
    tmp_path: Path, tokenizer: HfTokenizer, without_template: HfTokenizer
) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"lines.jsonl:1: messages need the chat template"):
        read(tmp_path, tokenizer, messages, template="plain")
    with pytest.raises(DataError, match=r"lines.jsonl:1: .*no chat template"):
        read(tmp_path, without_template, messages)
    with pytest.raises(ConfigError, match="--template chat: MODEL has no chat template"):
        Reader(without_template, 20, "chat").check("MODEL")


def test_a_model_that_cannot_end_an_answer_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no end-of-sequence id"):
        Reader(load_tokenizer(tmp_path), 20).check("MODEL")


def test_what_is_too_long_is_cut_or_left_out_and_said(
    tmp_path: Path, tokenizer: HfTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long_prompt, long_answer = {"prompt": "q" * 30, "answer": "a"}, {"prompt": "q", "answer": "z" * 30}
    with caplog.at_level("WARNING"):
        documents = read(tmp_path, tokenizer, long_prompt, long_answer, ASKED, template="plain", longest=20)
    assert [len(document.sequences[0].tokens) for document in documents] == [20, 8]
    reader = Reader(tokenizer, 20, "plain")
    assert [reader.is_whole(document.sequences[0]) for document in documents] == [False, True]
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("1 prompts of more than 19 tokens are left out")
    assert said[1].startswith("1 answers are cut short")
    messages = [{"role": role, "content": word} for word in ("a", "z" * 99) for role in ("user", "assistant")]
    (document,) = read(tmp_path, tokenizer, {"messages": messages}, longest=60)
    assert len(document.sequences) == 1
    assert caplog.records[-1].getMessage().startswith("1 prompts of more than 59 tokens are left out")
    with pytest.raises(DataError, match="nothing to learn from within 20 tokens"):
        read(tmp_path, tokenizer, long_prompt, template="plain", longest=20)


def test_only_jsonl_is_read(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("red\n")
    with pytest.raises(DataError, match=r"must be in a \.jsonl file"):
        Reader(tokenizer, 20).read(path)
