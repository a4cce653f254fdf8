"""Which implementation runs an operation, and why.

A registry of (operation, format, device) -> implementations, the preferred first: Triton where ``PACELINE_KERNELS``
asks for it, the native CPU kernels, plain torch, and the slow reference, which is everywhere. ``ops`` calls what
``choose`` returns; ``explain`` is what ``paceline info`` prints. "attention" is listed with the format of K and V; it
runs inside ``cpu.executor`` only, and has no reference here: without the library a decoder runs as torch modules, which
are not this package's.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from paceline.kernels import reference, reference_sampling
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import KernelsMissing, best_isa, library
from paceline.kernels.formats import FORMATS, VALUE_DTYPES, SparseTiles
from paceline.kernels.gpu import runtime

Op = Literal["linear", "attention", "argmax", "sparse_linear", "verify", "combine"]
Device = Literal["cpu", "cuda"]
KV_FORMATS = ("fp32", "bf16")
Wanted = Literal["auto", "torch", "native", "triton"]


class NoKernelError(LookupError):
    """No implementation of this operation for this format and device; the message says why."""


class UnknownKernelsError(ValueError):
    """``PACELINE_KERNELS`` names no set of kernels."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation.

    Attributes:
        run: the callable, called as in ``ops`` with the pool last; for "attention" the executor that contains it.
        missing: the reason why it cannot run on this machine, or None.
    """

    op: Op
    format: str
    device: Device
    name: str
    run: Callable[..., Any]
    missing: Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs an operation; ``kernel`` is None where nothing can."""

    op: Op
    format: str
    device: str
    kernel: Kernel | None
    why: str

    @property
    def words(self) -> str:
        """For people: the implementation, then the reason."""
        return f"{self.kernel.name if self.kernel else 'none'} ({self.why})"


def wanted() -> Wanted:
    """What ``PACELINE_KERNELS`` asks for.

    Raises:
        UnknownKernelsError: something that there is not.
    """
    told = os.environ.get("PACELINE_KERNELS") or "auto"
    for known in get_args(Wanted):
        if told == known:
            return known  # type: ignore[no-any-return]
    raise UnknownKernelsError(f"PACELINE_KERNELS is {told!r}; use native, torch or triton, or leave it unset")


def native_missing() -> str | None:
    """Why the native CPU kernels cannot run, or None if they can."""
    try:
        library()
    except (KernelsMissing, OSError) as error:
        return str(error)
    return None


def triton_missing(device: str) -> str | None:
    """Why Triton kernels do not run on a device, or None if they do."""
    if wanted() != "triton":
        return "PACELINE_KERNELS is not triton"
    return runtime.missing(device)


def _native(op: Op, format: str, run: Callable[..., Any]) -> Kernel:
    return Kernel(op, format, "cpu", "native", run, native_missing)


def _reference(op: Op, format: str, device: Device, run: Callable[..., Any]) -> Kernel:
    return Kernel(op, format, device, "reference", run, lambda: None)


def _triton(op: Op, format: str, device: Device, function: str) -> Kernel:
    run = runtime.lazy(function, function, device)
    return Kernel(op, format, device, "triton", run, partial(triton_missing, device))


def _multiply_dense(x: Tensor, tiles: SparseTiles, bias: Tensor | None) -> Tensor:
    """The weight is made dense at its first use and kept: as quick as a dense layer, and as large."""
    return F.linear(x, tiles.kept_dense(x.dtype), None if bias is None else bias.to(x.dtype))


@cache
def registry() -> tuple[Kernel, ...]:
    """Every implementation, in order of preference for equal (operation, format, device)."""
    kernels = [_native("linear", f, lambda x, layer, pool: pool.linear(x, layer)) for f in FORMATS]
    kernels += [_native("attention", f, Executor) for f in KV_FORMATS]
    kernels += [_native("argmax", "fp32", lambda x, pool: pool.argmax(x))]
    for device in get_args(Device):
        kernels += [
            _reference("linear", f, device, lambda x, layer, pool: reference.linear(x, layer))
            for f in FORMATS
        ]
        kernels += [_reference("argmax", "fp32", device, lambda x, pool: reference.argmax(x))]
        kernels += [_triton("sparse_linear", f, device, "sparse_linear") for f in VALUE_DTYPES]
        kernels += [
            Kernel("sparse_linear", f, device, "dense torch", _multiply_dense, lambda: None)
            for f in VALUE_DTYPES
        ]
        kernels += [_reference("sparse_linear", f, device, reference.sparse_linear) for f in VALUE_DTYPES]
        for op in ("combine", "verify"):
            kernels += [_triton(op, "fp32", device, op)]
            kernels += [_reference(op, "fp32", device, getattr(reference_sampling, op))]
    return tuple(kernels)


@cache
def _candidates(op: Op, format: str, device: str) -> tuple[Kernel, ...]:
    return tuple(k for k in registry() if (k.op, k.format, k.device) == (op, format, device))


def choose(op: Op, format: str, device: str = "cpu", *, has_pool: bool = True) -> Choice:
    """The best implementation that can run here.

    Args:
        has_pool: whether the caller has native threads to run on.

    Raises:
        IsaUnavailable: ``PACELINE_ISA`` forces an instruction set that is not here.
        UnknownKernelsError: see ``wanted``.
    """
    refusals: list[str] = []
    for kernel in _candidates(op, format, device):
        reason = kernel.missing()
        if kernel.name == "native" and not has_pool:
            reason = "no pool of threads given"
        if reason is None:
            return Choice(op, format, kernel.device, kernel, _why(kernel, refusals))
        if kernel.name == "triton" and wanted() == "triton":
            break  # asked for by name: nothing else will do
        refusals.append(f"{kernel.name}: {reason}")
    else:
        known = "; ".join(refusals) or f"no implementation for {format} on {device}"
        return Choice(op, format, device, None, known)
    return Choice(op, format, device, None, f"PACELINE_KERNELS is triton, but {reason}")


def _why(kernel: Kernel, refusals: list[str]) -> str:
    if kernel.name == "native":
        return best_isa()
    if kernel.name == "triton":
        return runtime.how(kernel.device)
    return "; ".join(refusals) or "the only one"


def kernel(op: Op, format: str, device: str, *, has_pool: bool) -> Kernel:
    """The implementation that ``choose`` takes.

    Raises:
        NoKernelError: there is none.
        UnknownKernelsError: see ``wanted``.
    """
    choice = choose(op, format, device, has_pool=has_pool)
    if choice.kernel is None:
        raise NoKernelError(f"{op} of {format} on {device}: {choice.why}")
    return choice.kernel


def explain(device: str = "cpu") -> list[Choice]:
    """One choice per operation and format of a device."""
    pairs = dict.fromkeys((k.op, k.format) for k in registry() if k.device == device)
    return [choose(op, format, device) for op, format in pairs]
