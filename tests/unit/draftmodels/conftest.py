"""Fixtures of the offline half: engines in this process over a tiny target, and what measures drafts of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint

from paceline.draftmodels.local_engine import LocalEngine


@pytest.fixture
def local(target: Path) -> Callable[..., LocalEngine]:
    """``local(model=target, **options)`` -> an engine in fp32 on one CPU thread with three streams."""

    def make(model: Path = target, **options: Any) -> LocalEngine:
        return LocalEngine(
            model, **dict[str, Any](weights="fp32", threads=1, streams=3, device="cpu") | options
        )

    return make


@pytest.fixture
def near(tiny_checkpoint: TinyCheckpoint) -> Path:
    """Agrees with the target often, but not always."""
    return tiny_checkpoint("llama", perturb=0.05)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of four prompts in two categories."""
    path = tmp_path / "held-out.jsonl"
    texts = ("the onion", "a tall tree", "it is here", "no one came")
    lines = [{"prompt": text, "category": "ab"[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
