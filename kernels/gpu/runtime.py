"""How Triton is brought into a process, and how often each of its kernels was launched.

Triton decides when its functions are decorated whether they are compiled for a GPU or interpreted by numpy, from
``TRITON_INTERPRET``. On machines without CUDA ``load`` therefore sets it before triton is imported for the first time.
This module imports no triton.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_INTERPRET = "TRITON_INTERPRET"
_TOO_LATE = (
    "triton was imported before its interpreter was asked for; "
    "set TRITON_INTERPRET=1 in the environment of the process"
)
_launches: Counter[str] = Counter()


class TritonMissingError(RuntimeError):
    """Triton cannot run here; the message says why."""


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing(device: str) -> str | None:
    """Why Triton kernels cannot run on a device ("cpu": by the interpreter), or None if they can."""
    if not _installed():
        return "triton is not installed (CUDA builds of torch bring it; else: pip install triton)"
    if device == "cpu" and "triton.language" in sys.modules and not interprets():
        return _TOO_LATE
    return None


def interprets() -> bool:
    """Whether the triton of this process interprets; if it was not imported yet, whether it would."""
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get(_INTERPRET, "0") not in ("", "0")
    return type(language.sum).__name__ == "InterpretedFunction"


def how(device: str) -> str:
    """In words what runs the kernels on a device."""
    return "interpreter" if device == "cpu" or interprets() else "compiled for this GPU"


def stored_type(dtype: torch.dtype) -> torch.dtype:
    """Type of a buffer that kernels store ``dtype`` to; it is rounded to ``dtype`` afterwards.

    The interpreter cuts fp32 off to bf16 instead of rounding it, as compiled kernels do: it gets fp32.
    """
    return torch.float32 if interprets() and dtype is torch.bfloat16 else dtype


def load(module: str, device: str) -> ModuleType:
    """Import a module of this package, and triton with it, for a device.

    Raises:
        TritonMissingError: it cannot run there.
    """
    found = sys.modules.get(f"paceline.kernels.gpu.{module}")
    if found is not None:
        return found
    reason = missing(device)
    if reason is not None:
        raise TritonMissingError(reason)
    if device == "cpu":
        os.environ[_INTERPRET] = "1"
    return import_module(f"paceline.kernels.gpu.{module}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel over a grid, and count it."""
    _launches[kernel.__name__] += 1
    kernel[grid](*args, **options)


def launches() -> Mapping[str, int]:
    """How often each kernel was launched since ``forget_launches``, by its function's name."""
    return dict(_launches)


def forget_launches() -> None:
    """Count from zero."""
    _launches.clear()


def lazy(module: str, function: str, device: str) -> Callable[..., Any]:
    """A function of this package that is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(load(module, device), function)(*args, **kwargs)

    return call
