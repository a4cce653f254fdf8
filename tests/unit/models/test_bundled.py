"""Drafts that come with Paceline: found by the target's weights, whatever anything is called."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Recorder, request, spec, tiny_engine, tokens
from native_drafts import EMBEDDING, write_draft
from sparse_students import write_tiny_student

from paceline.server.errors import ModelNotFoundError
from paceline.server.models import bundled, sources
from paceline.server.models.sources import resolve


@pytest.fixture
def looked_up_anew() -> Iterator[None]:
    """What is bundled, before and after."""
    bundled.bundled.cache_clear()
    yield
    bundled.bundled.cache_clear()


@pytest.fixture
def shipped(
    tmp_path: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, looked_up_anew: None
) -> Path:
    """A folder of bundled drafts with one that was made for the tiny Llama."""
    target = tiny_checkpoint("llama")
    draft = write_draft(tmp_path / "pretrained" / "tiny-draft", target, target, shared=[EMBEDDING])
    monkeypatch.setattr(bundled, "resources", SimpleNamespace(files=lambda package: tmp_path / "pretrained"))
    return draft


def default_draft(engine: Any) -> str | None:
    draft: str | None = engine._models["m"].info.default_draft
    return draft


def test_auto_takes_the_draft_that_was_made_for_these_weights(shipped, tiny_checkpoint, tmp_path) -> None:
    renamed = tmp_path / "called-something-else"
    shutil.copytree(tiny_checkpoint("llama"), renamed)
    assert default_draft(tiny_engine(spec(renamed, draft="auto"))) == "tiny-draft"
    assert default_draft(tiny_engine(spec(tiny_checkpoint("llama", perturb=0.02), draft="auto"))) is None
    assert default_draft(tiny_engine(spec(renamed, draft=None))) is None


def test_a_student_takes_the_draft_of_its_parent_and_says_what_it_says_alone(
    shipped, own_cache, tiny_checkpoint, tmp_path
) -> None:
    student = write_tiny_student(tmp_path / "student", tiny_checkpoint("llama"), sparsity=0.2)
    seeded = request([5, 9, 17], ignore_eos=True, temperature=0.8, seed=3)
    asked = [request([5, 9, 17], ignore_eos=True), seeded]
    recorder = Recorder()
    speculating = tiny_engine(spec(student, draft="auto"), observer=recorder)
    assert default_draft(speculating) == "tiny-draft"
    assert tokens(speculating, *asked) == tokens(tiny_engine(spec(student, draft=None)), *asked)
    assert sum(r.speculation.num_accepted_draft_tokens for r in recorder.requests) > 5


def test_other_artifacts_made_from_these_weights_take_none(
    shipped, own_cache, tiny_checkpoint, tmp_path
) -> None:
    """Only a student stands in for its base."""
    target = tiny_checkpoint("llama")
    draft = write_tiny_student(tmp_path / "own", target, kind="draft")
    assert default_draft(tiny_engine(spec(draft, draft="auto"))) is None
    other = write_tiny_student(tmp_path / "other", tiny_checkpoint("llama", perturb=0.02))
    assert default_draft(tiny_engine(spec(other, draft="auto"))) is None


def test_a_bundled_draft_has_a_name(shipped) -> None:
    assert resolve("tiny-draft") == shipped
    assert sources.cached("tiny-draft") == shipped


def test_without_the_package_nothing_is_bundled(
    monkeypatch: pytest.MonkeyPatch, looked_up_anew: None
) -> None:
    def missing(package: str) -> Path:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(bundled, "resources", SimpleNamespace(files=missing))
    assert bundled.bundled() == {}
    with pytest.raises(ModelNotFoundError):
        resolve("tiny-draft")
