"""Fixtures of unit tests: both executors, a cache of the test's own, the target that most drafts are made for."""

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from native_kernels import require_native


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which executor an engine takes on CPU: a test that uses it runs on torch modules and on the native kernels."""
    if request.param == "native":
        require_native()
    monkeypatch.setenv("PACELINE_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache; the folder appears with what is first put into it."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def target(tiny_checkpoint: TinyCheckpoint) -> Path:
    """The tiny Llama."""
    return tiny_checkpoint("llama")
