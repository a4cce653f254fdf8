"""The compiled CPU kernels through their plain C interface, and whether they are there.

The shared library is an extension module without Python in it: found next to this file, loaded with ctypes, which
releases the GIL during calls. Structs mirror ``csrc/paceline_cpu.h``; the ABI version is checked.

Environment: ``PACELINE_ISA`` forces a narrower instruction set; ``PACELINE_NATIVE_LIBRARY`` names another build of the
library (one with sanitizers, one by another compiler).
"""

import ctypes
import importlib.machinery
import itertools
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from paceline.kernels.formats import GROUP, LANES, Format, PackedLinear, pad_rows, padded

_log = logging.getLogger(__name__)
ABI_VERSION = 11
Isa = Literal["portable", "avx2", "avx512", "amx"]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "amx")
FORMAT_CODES: dict[Format, int] = {"fp32": 0, "bf16": 1, "int8": 2}
I32, I64, U64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
F32, PTR = ctypes.c_float, ctypes.c_void_p


class LinearStruct(ctypes.Structure):
    """pl_linear."""

    _fields_ = (
        *((name, I32) for name in ("format", "out", "in_", "in_padded")),
        *((name, PTR) for name in ("data", "tile_starts", "scale", "bias")),
        ("picks", I32),
    )


class KernelsMissing(RuntimeError):  # noqa: N818 - reads as the fact it states
    """The native library was not built or does not fit; the message says why and what to do."""


class IsaUnavailable(ValueError):  # noqa: N818 - reads as the fact it states
    """``PACELINE_ISA`` names what this CPU or this build does not have; the message lists what it has."""


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        KernelsMissing: not built (no compiler at install time), or built for another version.
    """
    path = _find()
    if path is None:
        raise KernelsMissing(
            "the native CPU kernels were not built when paceline was installed (is there a C++20 compiler?); "
            "install one and run pip install again"
        )
    lib = ctypes.CDLL(str(path))
    lib.pl_abi_version.restype = I32
    if lib.pl_abi_version() != ABI_VERSION:
        raise KernelsMissing(
            f"{path} has ABI {lib.pl_abi_version()}, this version needs {ABI_VERSION}: reinstall"
        )
    lib.pl_packed_bytes.restype = I64
    lib.pl_packed_bytes.argtypes = [I32, I32, I32]
    lib.pl_pool_create.restype = PTR
    lib.pl_pool_create.argtypes = [I32]
    lib.pl_pool_destroy.argtypes = [PTR]
    lib.pl_pack.argtypes = [I32, PTR, I32, I32, PTR, PTR, PTR]
    lib.pl_linears_forward.argtypes = [PTR, I32, PTR, I32, I32, PTR, PTR, I32]
    lib.pl_forward.argtypes = [PTR, PTR, I32, PTR, I32]
    lib.pl_draft_blocks.argtypes = [PTR, PTR, PTR, PTR, I32]
    lib.pl_read_states.argtypes = [PTR, PTR, PTR]
    lib.pl_read_states.restype = None
    lib.pl_argmax.argtypes = [PTR, I32, I64, PTR, PTR, I32]
    lib.pl_verify.argtypes = [PTR, I64, PTR, I32, I32, PTR, I32]
    lib.pl_read.argtypes = [PTR, I64, PTR, I32]
    lib.pl_gumbel.argtypes = [PTR, I32, I64, PTR, I32]
    lib.pl_gumbel.restype = None
    return lib


def _find() -> Path | None:
    named = os.environ.get("PACELINE_NATIVE_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise KernelsMissing(f"PACELINE_NATIVE_LIBRARY={named}: there is no such file")
        return Path(named)
    here = Path(__file__).parent
    names = [here / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in names if path.exists()), None)


def available() -> bool:
    """Whether the kernels can be used."""
    try:
        library()
    except (KernelsMissing, OSError) as error:
        _log.debug("CPU kernels: %s", error)
        return False
    return True


def usable_isas() -> tuple[Isa, ...]:
    """What this CPU runs and the library holds, the narrowest first."""
    return ISAS[: int(library().pl_best_isa()) + 1]


def best_isa() -> Isa:
    """The widest instruction set of this CPU; ``PACELINE_ISA`` forces a narrower one.

    Raises:
        IsaUnavailable: it forces one that is not here.
    """
    usable, forced = usable_isas(), os.environ.get("PACELINE_ISA")
    if not forced:
        return usable[-1]
    if forced not in usable:
        raise IsaUnavailable(f"PACELINE_ISA is {forced!r}; usable on this machine: {', '.join(usable)}")
    return usable[usable.index(forced)]


def isa_reason() -> str:
    """What ``best_isa`` takes and why, for people."""
    isa, usable = best_isa(), usable_isas()
    forced = f"PACELINE_ISA; the widest here is {usable[-1]}" if os.environ.get("PACELINE_ISA") else None
    return f"{isa} ({forced or 'the widest that this CPU runs'})"


class Pool:
    """The kernels' own threads; the calling thread is one of them.

    Args:
        threads: in all.
        isa: instruction set of every call made with this pool.
    """

    def __init__(self, threads: int, isa: Isa | None = None) -> None:
        self.threads = threads
        self.isa: Isa = isa or best_isa()
        self.isa_code = ISAS.index(self.isa)
        self._library = library()
        self.handle = self._library.pl_pool_create(threads)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.pl_pool_destroy(self.handle)

    def pack(self, weight: Tensor, format: Format, bias: Tensor | None = None) -> PackedLinear:
        """Pack a weight [out, in] of any float type."""
        weight = weight.float().contiguous()
        out, width = weight.shape
        code = FORMAT_CODES[format]
        data = torch.empty(self._library.pl_packed_bytes(code, out, width), dtype=torch.uint8)
        scale = torch.empty(padded(out, LANES)) if format == "int8" else None
        self._library.pl_pack(
            code, weight.data_ptr(), out, width, data.data_ptr(), pointer(scale), self.handle
        )
        return PackedLinear(format, out, width, data, scale, None if bias is None else pad_rows(bias.float()))

    def linear(self, x: Tensor, layer: PackedLinear) -> Tensor:
        """y = x W^T + bias: fp32 [rows, in] -> [rows, out]; int8 quantizes x in groups of 64."""
        x = x.float().contiguous()
        y = torch.empty(len(x), layer.out_features)
        self.linears(linear_structs([layer]), x, y)
        return y

    def linears(self, layers: "ctypes.Array[LinearStruct]", x: Tensor, y: Tensor) -> None:
        """Layers one after another, as a forward has them, for benches; the last one's result stays.

        Args:
            x: fp32 [rows, width]; each layer reads its first columns.
            y: fp32 with room for rows x the widest output.
        """
        status = self._library.pl_linears_forward(
            ctypes.addressof(layers),
            len(layers),
            x.data_ptr(),
            *x.shape,
            y.data_ptr(),
            self.handle,
            self.isa_code,
        )
        check(status)

    def argmax(self, x: Tensor) -> Tensor:
        """Index of each row's greatest value, the lowest among equals: fp32 [rows, n] -> int32 [rows]."""
        assert x.is_contiguous()
        assert x.dtype is torch.float32
        index = torch.empty(len(x), dtype=torch.int32)
        self._library.pl_argmax(
            x.data_ptr(), len(x), x.shape[1], index.data_ptr(), self.handle, self.isa_code
        )
        return index

    def read(self, memory: Tensor) -> None:
        """Read a tensor's memory once, for measuring bandwidth."""
        size = memory.numel() * memory.element_size()
        self._library.pl_read(memory.data_ptr(), size, self.handle, self.isa_code)


def gumbel(keys: Tensor, columns: int, isa: Isa | None = None) -> Tensor:
    """Standard Gumbel noise of SplitMix64 streams: int64 [rows] keys -> fp32 [rows, columns], on the calling thread.

    Args:
        isa: None is ``best_isa``.
    """
    assert keys.dtype is torch.int64
    assert keys.is_contiguous()
    noise = torch.empty(len(keys), columns)
    code = ISAS.index(isa or best_isa())
    library().pl_gumbel(keys.data_ptr(), len(keys), columns, noise.data_ptr(), code)
    return noise


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; None stays None."""
    return None if tensor is None else tensor.data_ptr()


def linear_struct(layer: PackedLinear) -> LinearStruct:
    """The layer as C sees it; points into the layer's tensors."""
    assert layer.format != "int8" or layer.in_padded % GROUP == 0
    return LinearStruct(
        FORMAT_CODES[layer.format],
        layer.out_features,
        layer.in_features,
        layer.in_padded,
        layer.data.data_ptr(),
        pointer(layer.tile_starts),
        pointer(layer.scale),
        pointer(layer.bias),
        layer.picks,
    )


def linear_structs(layers: Sequence[PackedLinear]) -> "ctypes.Array[LinearStruct]":
    """Several layers side by side, as C sees them."""
    return (LinearStruct * len(layers))(*map(linear_struct, layers))


def flat_tables(
    tables: Sequence[Sequence[int]],
) -> "tuple[ctypes.Array[ctypes.c_int32], ctypes.Array[ctypes.c_int32]]":
    """Block tables one after another, as C reads them: where each begins, and the blocks."""
    flat = [block for table in tables for block in table]
    starts = list(itertools.accumulate(map(len, tables[:-1]), initial=0)) if tables else []
    return (I32 * len(starts))(*starts), (I32 * len(flat))(*flat)


def check(status: Any) -> None:
    """Raise for a failed native call."""
    if status == -1:
        raise MemoryError("no memory for the activations of this batch; lower max_batch_tokens")
    assert status == 0, f"native call failed with {status}"
