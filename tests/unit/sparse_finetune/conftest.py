"""The tiny parent and its sparse students."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from sparse_students import write_tiny_student

TinyStudent = Callable[..., Path]


@pytest.fixture
def parent(tiny_checkpoint: TinyCheckpoint) -> Path:
    """A tiny Llama."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint) -> TinyStudent:
    """``tiny_student(pattern="unstructured", arch="llama", **others)`` -> folder, built once; don't write into it."""
    built: dict[str, Path] = {}

    def build(pattern: str = "unstructured", arch: Any = "llama", **others: Any) -> Path:
        key = repr((pattern, arch, sorted(others.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp("student") / "own"
            built[key] = write_tiny_student(folder, tiny_checkpoint(arch), pattern=pattern, **others)
        return built[key]

    return build


@pytest.fixture
def student(tiny_student: TinyStudent) -> Path:
    """Half of the parent's weights, unstructured, fp32."""
    return tiny_student()
