"""Sparse weights as artifacts store them: a bit per weight, and the values of the set bits.

The canonical, device-neutral layout: a bitmask uint8 [out, ceil(in / 8)], least significant bit first, padding bits 0;
values one per SET bit in row-major order, zeros among them being legal. "bitmask" (unstructured) has an int64 [out + 1]
of row offsets; n:m has n bits in every m inputs, so that its values are a matrix and no offsets are needed. int8 values
are in [-127, 127] with one fp32 scale per output row. Kernels repack this at load.

Everything that comes from a file is checked here, before anything is read by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

ValueDtype = Literal["fp32", "fp16", "bf16", "int8"]
VALUE_DTYPES: tuple[ValueDtype, ...] = get_args(ValueDtype)
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_NAMES: dict[torch.dtype, ValueDtype] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
}
_BITS = tuple(range(8))


class FormatError(ValueError):
    """Tensors that are not a sparse weight; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where values may stand: n of every m inputs, or anywhere (``n`` and ``m`` 0).

    Raises:
        FormatError: not 0 < n < m.
    """

    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if (self.n, self.m) != (0, 0) and not 0 < self.n < self.m:
            raise FormatError(f"an n:m pattern needs 0 < n < m, not {self.n}:{self.m}")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """ "unstructured", or "2:4", "16:32" and the like.

        Raises:
            FormatError: neither.
        """
        if text == "unstructured":
            return cls()
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise FormatError(f"a pattern is 'unstructured' or n:m such as 2:4, not {text!r}")
        return cls(int(n), int(m))

    @property
    def structured(self) -> bool:
        """Whether it is n:m."""
        return self.m > 0

    @property
    def density(self) -> float | None:
        """Share of weights kept; None where the pattern leaves it open."""
        return self.n / self.m if self.structured else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else "unstructured"


@dataclass(frozen=True, slots=True)
class SparseWeight:
    """The weight [out, in] of one linear layer.

    Attributes:
        bitmask: uint8 [out, ceil(in / 8)].
        values: fp32, fp16, bf16 or int8; [nnz], or [out, in * n / m] for n:m.
        row_offsets: int64 [out + 1], where a row's values begin; None for n:m.
        scale: fp32 [out] for int8, else None.

    Raises:
        FormatError: the parts contradict each other; nothing was read out of bounds.
    """

    pattern: Pattern
    in_features: int
    bitmask: Tensor
    values: Tensor
    row_offsets: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        _check_mask(self)
        _check_values(self)
        _check_counts(self)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        kept: Tensor | None = None,
        *,
        pattern: Pattern | None = None,
        scale: Tensor | None = None,
    ) -> "SparseWeight":
        """Leave out what is not kept.

        Args:
            weight: [out, in] in one of the value types; what is not kept must be zero.
            kept: bool [out, in]; None keeps what is not zero. Groups of an n:m pattern with fewer than n of them keep
                zeros too.
            scale: of int8 rows, fp32 [out].

        Raises:
            FormatError: more is kept than the pattern allows, or a weight that is not kept is not zero.
        """
        pattern = pattern or Pattern()
        if weight.dim() != 2:
            raise FormatError(f"a weight is [out, in], not {list(weight.shape)}")
        kept = weight != 0 if kept is None else kept
        if kept.shape != weight.shape or kept.dtype is not torch.bool:
            raise FormatError(f"what is kept must be bool {list(weight.shape)}, but is {_short(kept)}")
        if (weight[~kept] != 0).any():
            raise FormatError("weights outside the mask must be zero")
        if pattern.structured:
            kept = keep_at_least(kept, pattern)
        counts = kept.sum(1)
        values = weight[kept]
        offsets = None
        if pattern.structured:
            values = values.view(len(weight), -1)
        else:
            offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
            torch.cumsum(counts, 0, out=offsets[1:])
        return cls(pattern, weight.shape[1], _pack_bits(kept), values, offsets, scale)

    @classmethod
    def stack(cls, weights: Sequence["SparseWeight"]) -> "SparseWeight":
        """One weight for several that read the same input: their rows, one after another.

        Raises:
            FormatError: patterns, inputs or types of values differ.
        """
        first = weights[0]
        kinds = {(w.pattern, w.in_features, w.values.dtype) for w in weights}
        if len(kinds) > 1:
            raise FormatError(
                "sparse weights of different patterns, inputs or types of values cannot be joined"
            )
        offsets = None
        if first.row_offsets is not None:
            counts = torch.cat([w.row_offsets.diff() for w in weights if w.row_offsets is not None])
            offsets = torch.cat((first.row_offsets[:1], counts.cumsum(0)))
        scales = [w.scale for w in weights if w.scale is not None]
        return cls(
            first.pattern,
            first.in_features,
            torch.cat([w.bitmask for w in weights]),
            torch.cat([w.values for w in weights]),
            offsets,
            torch.cat(scales) if scales else None,
        )

    @property
    def out_features(self) -> int:
        """Output rows."""
        return len(self.bitmask)

    @property
    def value_dtype(self) -> ValueDtype:
        """Type of the values."""
        return _NAMES[self.values.dtype]

    @property
    def nnz(self) -> int:
        """Values stored."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """Share of weights that are left out."""
        return 1.0 - self.nnz / max(1, self.out_features * self.in_features)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts together."""
        parts = (self.bitmask, self.values, self.row_offsets, self.scale)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def kept(self) -> Tensor:
        """Which weights are stored, bool [out, in]."""
        return _unpack_bits(self.bitmask)[:, : self.in_features]

    def stored(self) -> Tensor:
        """The stored values at their places and zeros elsewhere, [out, in] in the value type."""
        dense = self.values.new_zeros(self.out_features, self.in_features)
        dense[self.kept()] = self.values.view(-1)
        return dense

    def to(self, *, dtype: torch.dtype, device: torch.device) -> "SparseWeight":
        """The weight on a device; float values in ``dtype``, int8 ones as they are."""
        values = self.values if self.values.dtype is torch.int8 else self.values.to(dtype)
        return replace(
            self,
            bitmask=self.bitmask.to(device),
            values=values.to(device),
            row_offsets=None if self.row_offsets is None else self.row_offsets.to(device),
            scale=None if self.scale is None else self.scale.to(device),
        )

    def to_dense(self) -> Tensor:
        """The weight as fp32 [out, in]; int8 comes dequantized."""
        dense = self.stored().float()
        return dense if self.scale is None else dense * self.scale[:, None]


def keep_at_least(kept: Tensor, pattern: Pattern) -> Tensor:
    """Fill every group of m up to n with its first free places.

    Args:
        kept: bool [out, in].

    Raises:
        FormatError: a group has more than n, or m does not divide the inputs.
    """
    out, width = kept.shape
    if width % pattern.m:
        raise FormatError(f"{width} inputs are not whole groups of {pattern.m}")
    groups = kept.view(out, -1, pattern.m)
    counts = groups.sum(-1, keepdim=True)
    if (counts > pattern.n).any():
        raise FormatError(f"more than {pattern.n} of {pattern.m} weights are kept in a group of {pattern}")
    free = ~groups
    filled = free & (free.cumsum(-1) <= pattern.n - counts)
    return (groups | filled).view(out, width)


def _check_mask(weight: SparseWeight) -> None:
    mask, width = weight.bitmask, weight.in_features
    if width < 1:
        raise FormatError(f"a weight needs inputs, not {width}")
    if mask.dtype is not torch.uint8 or mask.dim() != 2 or mask.shape[1] != -(-width // 8):
        raise FormatError(f"the bitmask must be uint8 [out, {-(-width // 8)}], but is {_short(mask)}")
    if width % 8 and (mask[:, -1] >> (width % 8)).any():
        raise FormatError(f"the bitmask has bits set behind the {width} inputs")
    if weight.pattern.structured and width % weight.pattern.m:
        raise FormatError(f"{width} inputs are not whole groups of {weight.pattern.m}")


def _check_values(weight: SparseWeight) -> None:
    out, values, scale = weight.out_features, weight.values, weight.scale
    pattern = weight.pattern
    if values.dtype not in _NAMES:
        raise FormatError(f"values must be {', '.join(VALUE_DTYPES)}, but are {_short(values)}")
    shape = [out, weight.in_features * pattern.n // pattern.m] if pattern.structured else None
    if shape is not None and list(values.shape) != shape:
        raise FormatError(f"the values of a {pattern} weight must be {shape}, but are {_short(values)}")
    if shape is None and values.dim() != 1:
        raise FormatError(f"values must be [nnz], but are {_short(values)}")
    if (values.dtype is torch.int8) != (scale is not None):
        raise FormatError("int8 values need one scale per output row, other values have none")
    if scale is not None and (scale.dtype is not torch.float32 or scale.shape != (out,)):
        raise FormatError(f"scales must be fp32 [{out}], but are {_short(scale)}")
    if values.dtype is torch.int8 and (values == -128).any():
        raise FormatError("int8 values are in [-127, 127], but there is a -128")


def _check_counts(weight: SparseWeight) -> None:
    bits, offsets, pattern = _unpack_bits(weight.bitmask), weight.row_offsets, weight.pattern
    if pattern.structured:
        if offsets is not None:
            raise FormatError(f"a {pattern} weight has no row offsets")
        counts = bits[:, : weight.in_features].view(weight.out_features, -1, pattern.m).sum(-1)
        if (counts != pattern.n).any():
            raise FormatError(f"a {pattern} weight needs {pattern.n} bits in every group of {pattern.m}")
        return
    if offsets is None or offsets.dtype is not torch.int64 or offsets.shape != (weight.out_features + 1,):
        found = "missing" if offsets is None else _short(offsets)
        raise FormatError(f"row offsets must be int64 [{weight.out_features + 1}], but are {found}")
    counts = bits.sum(1)
    if int(counts.sum()) != weight.nnz:
        raise FormatError(f"the bitmask has {int(counts.sum())} bits set, but there are {weight.nnz} values")
    if int(offsets[0]) != 0 or not torch.equal(offsets.diff(), counts):
        raise FormatError("the row offsets do not count the bits of the rows")


def _pack_bits(kept: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in / 8)], least significant bit first."""
    out, width = kept.shape
    whole = kept.new_zeros(out, -(-width // 8) * 8)
    whole[:, :width] = kept
    places = torch.tensor([1 << bit for bit in _BITS], dtype=torch.uint8, device=kept.device)
    return (whole.view(out, -1, 8).to(torch.uint8) * places).sum(-1, dtype=torch.uint8)


def _unpack_bits(bitmask: Tensor) -> Tensor:
    """uint8 [out, bytes] -> bool [out, 8 * bytes]."""
    places = torch.tensor(_BITS, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask[..., None] >> places) & 1).bool().flatten(1)


def _short(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
