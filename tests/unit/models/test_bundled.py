"""Drafts that come with Paceline: found by the target's weights, whatever anything is called."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import spec, tiny_engine
from native_drafts import EMBEDDING, write_draft

from paceline.server.errors import ModelNotFoundError
from paceline.server.models import bundled, sources
from paceline.server.models.sources import resolve


@pytest.fixture
def shipped(tmp_path: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of bundled drafts with one that was made for the tiny Llama."""
    target = tiny_checkpoint("llama")
    draft = write_draft(tmp_path / "pretrained" / "tiny-draft", target, target, shared=[EMBEDDING])
    monkeypatch.setattr(bundled, "resources", SimpleNamespace(files=lambda package: tmp_path / "pretrained"))
    bundled.bundled.cache_clear()
    yield draft
    bundled.bundled.cache_clear()


def default_draft(engine: Any) -> str | None:
    draft: str | None = engine._models["m"].info.default_draft
    return draft


def test_auto_takes_the_draft_that_was_made_for_these_weights(shipped, tiny_checkpoint, tmp_path) -> None:
    renamed = tmp_path / "called-something-else"
    shutil.copytree(tiny_checkpoint("llama"), renamed)
    assert default_draft(tiny_engine(spec(renamed, draft="auto"))) == "tiny-draft"
    assert default_draft(tiny_engine(spec(tiny_checkpoint("llama", perturb=0.02), draft="auto"))) is None
    assert default_draft(tiny_engine(spec(renamed, draft=None))) is None


def test_a_bundled_draft_has_a_name(shipped) -> None:
    assert resolve("tiny-draft") == shipped
    assert sources.cached("tiny-draft") == shipped


def test_without_the_package_nothing_is_bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> Path:
        raise ModuleNotFoundError(package)

    bundled.bundled.cache_clear()
    monkeypatch.setattr(bundled, "resources", SimpleNamespace(files=missing))
    assert bundled.bundled() == {}
    bundled.bundled.cache_clear()
    with pytest.raises(ModelNotFoundError):
        resolve("tiny-draft")
