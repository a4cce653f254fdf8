"""The catalog's default model, as a user gets it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from real_models import SMOLLM2

from paceline.server.models import sources
from paceline.server.models.catalog import catalog
from paceline.server.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.real


def test_the_default_model_has_the_pinned_bytes(real_model: Callable[[str], Path]) -> None:
    path, entry = real_model(SMOLLM2), catalog()[SMOLLM2]

    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert path.stat().st_size == entry.size_bytes
    assert open_checkpoint(path).weights_sha256() == entry.sha256


def test_once_fetched_it_needs_no_source(
    real_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = real_model(SMOLLM2)

    def no_source(*_: object) -> None:
        raise AssertionError("a cached model was fetched again")

    monkeypatch.setattr(sources, "_fetch_from", no_source)
    assert sources.resolve(SMOLLM2) == path
    assert sources.cached(SMOLLM2) == path
