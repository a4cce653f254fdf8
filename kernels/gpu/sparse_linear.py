"""y = x W^T + bias for W in sparse tiles: few rows by expanding on chip, many by expanding into memory once.

A program owns the output rows of one row of tiles and walks along the inputs: one stream of memory per program, nothing
written twice, no atomics. Where that makes too few programs to fill a GPU the inputs are split among several, whose
partial sums a second kernel adds in a fixed order. M = 1 multiplies and adds in fp32 (``gemv_kernel``); M > 1 pads x to
16 rows or more and uses the matrix units (``gemm_kernel``), weights as their left operand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from paceline.kernels.formats import SparseTiles
from paceline.kernels.gpu.expand import expand, expand_tile, tile_arguments, tile_constants
from paceline.kernels.gpu.runtime import interprets, launch, stored_type
from paceline.kernels.gpu.table import Plan, plan_for


@triton.jit
def gemv_kernel(
    x,
    out,
    masks,
    values,
    starts,
    scale,
    bias,
    out_features,
    in_features,
    column_tiles,
    tiles_per_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONGEST: tl.constexpr,
    PER_WORD: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,  # out is fp32 [splits, out] without scale and bias
):
    """x [in] -> out [out]; grid (row tiles, splits)."""
    row_tile, split = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = split * tiles_per_split
    for at in range(first, tl.minimum(first + tiles_per_split, column_tiles)):
        tile = row_tile * column_tiles + at
        weights = expand_tile(masks, values, starts, tile, ROWS, COLUMNS, LONGEST, PER_WORD, UNIT)
        inputs = at * COLUMNS + columns
        given = tl.load(x + inputs, mask=inputs < in_features, other=0)
        sums += weights.to(tl.float32) * given.to(tl.float32)[None, :]
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    total = tl.sum(sums, 1)
    if IS_PARTIAL:
        tl.store(out + split * out_features + rows, total, mask=inside)
    else:
        if HAS_SCALE:
            total *= tl.load(scale + rows, mask=inside, other=0)
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemm_kernel(
    x,
    out,
    masks,
    values,
    starts,
    scale,
    bias,
    out_features,
    in_features,
    column_tiles,
    tiles_per_split,
    num_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONGEST: tl.constexpr,
    PER_WORD: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,  # out is fp32 [splits, num_rows, out] without scale and bias
    IN_FP32: tl.constexpr,  # neither operand's type holds the other's values
    BLOCK: tl.constexpr,  # rows of x per program, 16 or more
):
    """x [num_rows, in] -> out [num_rows, out]; grid (row tiles, splits, blocks of rows of x)."""
    row_tile, split = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    x_rows = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    first = split * tiles_per_split
    for at in range(first, tl.minimum(first + tiles_per_split, column_tiles)):
        tile = row_tile * column_tiles + at
        weights = expand_tile(masks, values, starts, tile, ROWS, COLUMNS, LONGEST, PER_WORD, UNIT)
        inputs = at * COLUMNS + columns
        here = (inputs < in_features)[:, None] & (x_rows < num_rows)[None, :]
        given = tl.load(x + x_rows[None, :] * in_features + inputs[:, None], mask=here, other=0)
        if IN_FP32:
            given = given.to(tl.float32)
        sums = tl.dot(weights.to(given.dtype), given, sums, input_precision="ieee")
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    stored = inside[:, None] & (x_rows < num_rows)[None, :]
    at_out = x_rows[None, :] * out_features + rows[:, None]
    if IS_PARTIAL:
        tl.store(out + split * num_rows * out_features + at_out, sums, mask=stored)
    else:
        if HAS_SCALE:
            sums *= tl.load(scale + rows, mask=inside, other=0)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)[:, None]
        tl.store(out + at_out, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def add_splits_kernel(
    partial,
    out,
    scale,
    bias,
    out_features,
    size,
    splits,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial fp32 [splits, size] -> out [size], size being rows of x times out_features."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * size + at, mask=inside, other=0)
    if HAS_SCALE:
        total *= tl.load(scale + at % out_features, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % out_features, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


_ADD_BLOCK = 256


def sparse_linear(x: Tensor, tiles: SparseTiles, bias: Tensor | None, plan: Plan | None = None) -> Tensor:
    """See ``ops.sparse_linear``.

    Args:
        plan: how; None takes the table's for this device, format, shape and number of rows.
    """
    plan = plan or plan_for(tiles, len(x))
    if not len(x):
        return x.new_empty(0, tiles.out_features)
    if not plan.is_sparse:
        return F.linear(x, expand(tiles, x.dtype), None if bias is None else bias.to(x.dtype))
    x = x.contiguous()
    out = torch.empty(len(x), tiles.out_features, dtype=stored_type(x.dtype), device=x.device)
    across = tiles.masks.shape[1]
    per_split = triton.cdiv(across, min(plan.splits, across))
    splits = triton.cdiv(across, per_split)
    target = out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
    _multiply(x, tiles, bias, target, per_split, splits, plan)
    if splits > 1:
        _add_splits(target, out, tiles, bias)
    return out.to(x.dtype)


def _multiply(
    x: Tensor, tiles: SparseTiles, bias: Tensor | None, out: Tensor, per_split: int, splits: int, plan: Plan
) -> None:
    down, across = tiles.masks.shape[:2]
    args = (x, out, *tile_arguments(tiles), tiles.masks if bias is None else bias)
    shape = (tiles.out_features, tiles.in_features, across, per_split)
    constants = {
        **tile_constants(tiles),
        "HAS_BIAS": bias is not None,
        "IS_PARTIAL": splits > 1,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    if len(x) == 1:
        launch(gemv_kernel, (down, splits), *args, *shape, **constants)
        return
    block = block_of_rows(len(x))
    constants |= {
        "BLOCK": block,
        "IN_FP32": needs_fp32(x.dtype, tiles.values.dtype),
        "num_warps": max(plan.num_warps, least_warps(block)),
    }
    launch(gemm_kernel, (down, splits, triton.cdiv(len(x), block)), *args, *shape, len(x), **constants)


def block_of_rows(rows: int) -> int:
    """Rows of x per program: the matrix units want 16, more than 64 would not fit registers."""
    return min(64, max(16, int(triton.next_power_of_2(rows))))


def least_warps(block: int) -> int:
    """With 64 rows four warps run out of registers."""
    return 8 if block > 32 else 4


def needs_fp32(x: torch.dtype, values: torch.dtype) -> bool:
    """Whether the product must be made in fp32: neither type holds the other's values exactly.

    Also for bf16 under the interpreter, whose dot takes the bits of bf16 for integers. Products of two bf16 numbers are
    exact in fp32 and sums are fp32 in any case, so that it computes what the matrix units do.
    """
    return (x is not values and values is not torch.int8) or (interprets() and x is torch.bfloat16)


def _add_splits(partial: Tensor, out: Tensor, tiles: SparseTiles, bias: Tensor | None) -> None:
    stand_in = tiles.masks
    launch(
        add_splits_kernel,
        (triton.cdiv(out.numel(), _ADD_BLOCK),),
        partial,
        out,
        stand_in if tiles.scale is None else tiles.scale,
        stand_in if bias is None else bias,
        tiles.out_features,
        out.numel(),
        len(partial),
        HAS_SCALE=tiles.scale is not None,
        HAS_BIAS=bias is not None,
        BLOCK=_ADD_BLOCK,
    )
