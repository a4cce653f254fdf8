"""Fixtures of the offline half: both executors, and engines in this process over a tiny target."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from native_kernels import require_native

from paceline.draftmodels.local_engine import LocalEngine


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which executor an engine takes on CPU, torch modules or the native kernels."""
    if request.param == "native":
        require_native()
    monkeypatch.setenv("PACELINE_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def target(tiny_checkpoint: TinyCheckpoint) -> Path:
    """The tiny target of most tests."""
    return tiny_checkpoint("llama")


@pytest.fixture
def local(target: Path) -> Callable[..., LocalEngine]:
    """``local(model=target, **options)`` -> an engine in fp32 on one CPU thread with three streams."""

    def make(model: Path = target, **options: Any) -> LocalEngine:
        return LocalEngine(
            model, **dict[str, Any](weights="fp32", threads=1, streams=3, device="cpu") | options
        )

    return make
