"""Prompt files: what is accepted, and one clear line for what is not."""

import json
from pathlib import Path

import pytest

from paceline.clients.workload import BUILT_IN, Prompt, UsageError, read_prompts


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(
        tmp_path / "prompts.data",  # recognised by its content
        json.dumps({"prompt": "Line\u2028separators stay", "id": 7}, ensure_ascii=False),
        "",
        json.dumps({"messages": messages, "max_tokens": 5}),
    )
    text, chat = read_prompts(path)
    assert text == Prompt(text="Line\u2028separators stay")
    assert text.body("completions") == {"prompt": "Line\u2028separators stay"}
    assert text.body("chat") == {"messages": [{"role": "user", "content": "Line\u2028separators stay"}]}
    assert chat.body("chat") == {"messages": messages, "max_tokens": 5}
    with pytest.raises(UsageError, match="--endpoint chat"):
        chat.body("completions")


def test_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "What is one?", "  ", "  [2] and {3}  ")
    assert read_prompts(path) == (Prompt(text="What is one?"), Prompt(text="[2] and {3}"))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"prompt": "a"}', '{"prompt": '], ":2: not valid JSON"),
        (["[1]"], ":1: not an object"),
        (["{}"], ':1: needs exactly one of "prompt" and "messages"'),
        (['{"prompt": "a", "messages": [{"role": "user"}]}'], ":1: needs exactly one"),
        (['{"prompt": 3}'], ':1: "prompt" is not a non-empty string'),
        (['{"prompt": ""}'], ':1: "prompt" is not a non-empty string'),
        (['{"messages": []}'], ':1: "messages" is not a non-empty list'),
        (['{"messages": ["Hi"]}'], ':1: a message is not an object with a "role"'),
        (['{"prompt": "a", "max_tokens": 0}'], ':1: "max_tokens" is 0'),
        (['{"prompt": "a", "max_tokens": true}'], ':1: "max_tokens" is True'),
        (["", "  "], "holds no prompts"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, lines: list[str], problem: str) -> None:
    path = write(tmp_path / "prompts.jsonl", *lines)
    with pytest.raises(UsageError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file.*--prompts"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8 text at byte 3"):
        read_prompts(tmp_path / "latin.txt")


def test_the_built_in_set_fits_both_endpoints_and_has_no_doubles() -> None:
    assert len({prompt.text for prompt in BUILT_IN}) == len(BUILT_IN) >= 16
    assert all(prompt.body("completions")["prompt"] for prompt in BUILT_IN)
