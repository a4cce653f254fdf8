"""Fixtures of the offline half: engines in this process over a tiny target."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.draftmodels.local_engine import LocalEngine


@pytest.fixture
def local(target: Path) -> Callable[..., LocalEngine]:
    """``local(model=target, **options)`` -> an engine in fp32 on one CPU thread with three streams."""

    def make(model: Path = target, **options: Any) -> LocalEngine:
        return LocalEngine(
            model, **dict[str, Any](weights="fp32", threads=1, streams=3, device="cpu") | options
        )

    return make
