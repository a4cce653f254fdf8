"""The canonical sparse layout: bit-exact round trips, exact sizes, and refusal of parts that contradict each other."""

import dataclasses
from typing import Any

import pytest
import torch

from paceline.kernels.formats import FormatError, Pattern, SparseWeight

PATTERNS = ["unstructured", "2:4", "16:32", "16:64"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def weight(pattern: Pattern, dtype: torch.dtype, out: int = 5, width: int = 128) -> SparseWeight:
    """A random weight; unstructured ones have a width that is no multiple of 8, and an empty row."""
    torch.manual_seed(3)
    if not pattern.structured:
        width -= 3
    dense = torch.randint(-127, 128, (out, width)).to(dtype)
    if pattern.structured:
        order = torch.rand(out, width // pattern.m, pattern.m).argsort(-1)
        kept = (order < pattern.n).view(out, width)
    else:
        kept = torch.rand(out, width) < 0.4
        kept[2] = False
    scale = torch.rand(out) + 0.5 if dtype is torch.int8 else None
    return SparseWeight.from_dense(torch.where(kept, dense, 0), kept, pattern=pattern, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_round_trip_is_bit_exact(text: str, dtype: torch.dtype) -> None:
    sparse = weight(Pattern.parse(text), dtype)
    again = SparseWeight.from_dense(
        sparse.stored(), sparse.kept(), pattern=sparse.pattern, scale=sparse.scale
    )
    assert sparse.stored().count_nonzero() > 0
    assert torch.equal(sparse.values, again.values)
    assert torch.equal(sparse.bitmask, again.bitmask)
    expected = sparse.stored().float() * (1 if sparse.scale is None else sparse.scale[:, None])
    assert torch.equal(sparse.to_dense(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_bytes_are_those_of_the_format(text: str, dtype: torch.dtype) -> None:
    sparse = weight(Pattern.parse(text), dtype)
    out, width, nnz = sparse.out_features, sparse.in_features, int(sparse.kept().sum())
    scale = 4 * out if dtype is torch.int8 else 0
    offsets = 0 if sparse.pattern.structured else 8 * (out + 1)
    assert sparse.num_bytes == out * -(-width // 8) + nnz * dtype.itemsize + scale + offsets


def test_bits_are_least_significant_first() -> None:
    sparse = SparseWeight.from_dense(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0, 0, 3]]))
    assert sparse.bitmask.tolist() == [[0b1001, 0b10]]
    assert sparse.values.tolist() == [1, 2, 3]


def test_a_kept_zero_is_a_value() -> None:
    kept = torch.tensor([[True, True, False, False]])
    sparse = SparseWeight.from_dense(torch.tensor([[0.0, 2, 0, 0]]), kept)
    assert sparse.values.tolist() == [0, 2]


def test_groups_with_too_few_values_keep_zeros() -> None:
    sparse = SparseWeight.from_dense(torch.tensor([[0.0, 0, 7, 0]]), pattern=Pattern(2, 4))
    assert sparse.values.tolist() == [[0, 7]]


def test_too_many_values_of_a_group_are_refused() -> None:
    with pytest.raises(FormatError, match="more than 2 of 4"):
        SparseWeight.from_dense(torch.ones(1, 8), pattern=Pattern(2, 4))


def test_weights_outside_the_mask_are_refused() -> None:
    with pytest.raises(FormatError, match="outside the mask"):
        SparseWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "x", "2:", "-1:4", ""])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="n:m"):
        Pattern.parse(text)


def _flipped(sparse: SparseWeight) -> torch.Tensor:
    mask = sparse.bitmask.clone()
    mask[0, 0] ^= 1
    return mask


def _shifted(sparse: SparseWeight) -> torch.Tensor:
    assert sparse.row_offsets is not None
    offsets = sparse.row_offsets.clone()
    offsets[1] += 1
    return offsets


BITMASK_FAULTS = {
    "more bits than values": lambda s: {"bitmask": _flipped(s)},
    "truncated values": lambda s: {"values": s.values[:-1]},
    "truncated mask": lambda s: {"bitmask": s.bitmask[:, :-1]},
    "mask of another type": lambda s: {"bitmask": s.bitmask.to(torch.int16)},
    "padding bits": lambda s: {"in_features": s.in_features - 1, "bitmask": s.bitmask | 0x80},
    "values of another shape": lambda s: {"values": s.values[None]},
    "values of another type": lambda s: {"values": s.values.double()},
    "missing offsets": lambda s: {"row_offsets": None},
    "bad offsets": lambda s: {"row_offsets": _shifted(s)},
    "offsets far outside": lambda s: {"row_offsets": s.row_offsets * 2**40},
    "offsets of another length": lambda s: {"row_offsets": s.row_offsets[:-1]},
    "scale without int8": lambda s: {"scale": torch.ones(s.out_features)},
    "no inputs": lambda s: {"in_features": 0},
}


@pytest.mark.parametrize("fault", BITMASK_FAULTS)
def test_corrupt_bitmask_weights_are_refused(fault: str) -> None:
    sparse = weight(Pattern(), torch.float32)
    with pytest.raises(FormatError):
        dataclasses.replace(sparse, **BITMASK_FAULTS[fault](sparse))


INT8_FAULTS: dict[str, dict[str, Any]] = {
    "no scale": {"scale": None},
    "scale of another shape": {"scale": torch.ones(4)},
    "scale of another type": {"scale": torch.ones(5, dtype=torch.float64)},
}


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_corrupt_int8_weights_are_refused(fault: str) -> None:
    with pytest.raises(FormatError, match="scale"):
        dataclasses.replace(weight(Pattern(), torch.int8), **INT8_FAULTS[fault])


def test_the_lowest_int8_is_refused() -> None:
    sparse = weight(Pattern(), torch.int8)
    values = sparse.values.clone()
    values[0] = -128
    with pytest.raises(FormatError, match="-128"):
        dataclasses.replace(sparse, values=values)


NM_FAULTS = {
    "a bit moved to another group": lambda s: {
        "bitmask": torch.roll(s.bitmask.view(-1), 1).view_as(s.bitmask) ^ 0x11
    },
    "values of another shape": lambda s: {"values": s.values[:, :-1]},
    "offsets": lambda s: {"row_offsets": torch.zeros(6, dtype=torch.int64)},
    "inputs that are not whole groups": lambda s: {"in_features": s.in_features - 2},
}


@pytest.mark.parametrize("fault", NM_FAULTS)
def test_corrupt_nm_weights_are_refused(fault: str) -> None:
    sparse = weight(Pattern(2, 4), torch.float16)
    with pytest.raises(FormatError):
        dataclasses.replace(sparse, **NM_FAULTS[fault](sparse))
