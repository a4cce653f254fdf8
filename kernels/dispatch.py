"""Which implementation runs an operation, and why.

A registry of (operation, format, device) -> implementations, the preferred first: the native CPU kernels, then the
slow torch reference, which is everywhere. ``ops`` calls what ``choose`` returns; ``explain`` is what ``paceline info``
prints. "attention" is listed with the format of K and V; it runs inside ``cpu.executor`` only, and has no reference
here: without the library a decoder runs as torch modules, which are not this package's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from paceline.kernels import reference
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import KernelsMissing, best_isa, library
from paceline.kernels.formats import FORMATS

Op = Literal["linear", "attention", "argmax"]
Device = Literal["cpu", "cuda"]
KV_FORMATS = ("fp32", "bf16")


class NoKernelError(LookupError):
    """No implementation of this operation for this format and device; the message says why."""


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


def native_missing() -> str | None:
    """Why the native CPU kernels cannot run, or None if they can."""
    try:
        library()
    except (KernelsMissing, OSError) as error:
        return str(error)
    return None


def _native(op: Op, format: str, run: Callable[..., Any]) -> Kernel:
    return Kernel(op, format, "cpu", "native", run, native_missing)


def _reference(op: Op, format: str, device: Device, run: Callable[..., Any]) -> Kernel:
    return Kernel(op, format, device, "reference", run, lambda: None)


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
    return tuple(kernels)


def choose(op: Op, format: str, device: str = "cpu", *, has_pool: bool = True) -> Choice:
    """The best implementation that can run here.

    Args:
        has_pool: whether the caller has native threads to run on.

    Raises:
        IsaUnavailable: ``PACELINE_ISA`` forces an instruction set that is not here.
    """
    refusals: list[str] = []
    for kernel in registry():
        if (kernel.op, kernel.format, kernel.device) != (op, format, device):
            continue
        reason = kernel.missing()
        if kernel.name == "native" and not has_pool:
            reason = "no pool of threads given"
        if reason is None:
            why = best_isa() if kernel.name == "native" else "; ".join(refusals) or "the only one"
            return Choice(op, format, kernel.device, kernel, why)
        refusals.append(f"{kernel.name}: {reason}")
    known = "; ".join(refusals) or f"no implementation for {format} on {device}"
    return Choice(op, format, device, None, known)


def kernel(op: Op, format: str, device: str, *, has_pool: bool) -> Kernel:
    """The implementation that ``choose`` takes.

    Raises:
        NoKernelError: there is none.
    """
    choice = choose(op, format, device, has_pool=has_pool)
    if choice.kernel is None:
        raise NoKernelError(f"{op} of {format} on {device}: {choice.why}")
    return choice.kernel


def explain(device: str = "cpu") -> list[Choice]:
    """One choice per operation and format of a device."""
    wanted = dict.fromkeys((k.op, k.format) for k in registry() if k.device == device)
    return [choose(op, format, device) for op, format in wanted]
