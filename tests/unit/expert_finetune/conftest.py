"""A tiny task: a colour's word is the answer, whatever number the prompt has besides."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

TASK = {"red": "hot", "blue": "cold", "green": "alive"}
WriteLines = Callable[[Sequence[Mapping[str, Any]]], Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """``write_lines(objects)`` -> a .jsonl file."""

    def write(lines: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / "task.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data(write_lines: WriteLines) -> Path:
    """48 prompts with answers."""
    return write_lines(
        [
            {"prompt": f"{word} {number}", "answer": answer}
            for number in range(16)
            for word, answer in TASK.items()
        ]
    )
