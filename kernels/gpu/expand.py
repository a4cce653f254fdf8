"""Packed values to dense ones: on chip, tile by tile, for the other kernels; and as an operation of its own.

A tile's values come in with 16-byte loads, one after another; the mask then says from which of them each weight is
gathered: the values before its word plus the set bits below it. Compilers turn ``popcount`` into one instruction, and
the gather goes through shared memory. Layout: ``formats.tiles``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.kernels.formats import SparseTiles
from paceline.kernels.gpu.runtime import launch, stored_type


@triton.jit
def popcount(words):
    """Set bits of int32 words; LLVM knows the idiom and makes it popc (NVIDIA) or v_bcnt (AMD)."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def expand_tile(
    masks,
    values,
    starts,
    tile,
    ROWS: tl.constexpr,  # Triton's way to write what is known when compiling
    COLUMNS: tl.constexpr,
    LONGEST: tl.constexpr,  # a power of two, at least the values of any tile
    PER_WORD: tl.constexpr,  # places per word in the fixed layout, else 0
    UNIT: tl.constexpr,  # values in 16 bytes
):
    """One tile [ROWS, COLUMNS] in the values' type, zeros where no bit is set."""
    WORDS: tl.constexpr = ROWS * COLUMNS // 32
    words = tl.load(masks + tile * WORDS + tl.arange(0, WORDS))
    if PER_WORD > 0:
        before = tl.arange(0, WORDS) * PER_WORD
        first = tile * (WORDS * PER_WORD)
        count = WORDS * PER_WORD
    else:
        counts = popcount(words)
        before = tl.cumsum(counts, 0) - counts
        # Multiples of UNIT, visibly so: only then are 16-byte loads made.
        begin = tl.load(starts + tile)
        first = begin * UNIT
        count = (tl.load(starts + tile + 1) - begin) * UNIT
    places = tl.arange(0, LONGEST)
    packed = tl.load(values + first + places, mask=places < count, other=0)
    bits = tl.arange(0, 32)
    kept = ((words[:, None] >> bits[None, :]) & 1) != 0
    below = popcount(words[:, None] & ((1 << bits) - 1)[None, :])
    index = tl.where(kept, before[:, None] + below, 0)
    dense = tl.gather(packed, tl.reshape(index, [ROWS * COLUMNS]), 0)
    dense = tl.where(tl.reshape(kept, [ROWS * COLUMNS]), dense, 0)
    return tl.reshape(dense, [ROWS, COLUMNS])


@triton.jit
def expand_kernel(
    out,
    masks,
    values,
    starts,
    scale,
    out_features,
    in_features,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONGEST: tl.constexpr,
    PER_WORD: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """One tile per program: out [out_features, in_features] in its type, int8 dequantized."""
    tile = tl.program_id(0)
    rows = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    dense = expand_tile(masks, values, starts, tile, ROWS, COLUMNS, LONGEST, PER_WORD, UNIT)
    if HAS_SCALE:
        dense = dense.to(tl.float32) * tl.load(scale + rows, mask=rows < out_features, other=0)[:, None]
    inside = (rows < out_features)[:, None] & (columns < in_features)[None, :]
    at = rows.to(tl.int64)[:, None] * in_features + columns[None, :]
    tl.store(out + at, dense.to(out.dtype.element_ty), mask=inside)


def tile_arguments(tiles: SparseTiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks, values, starts and scale as kernels take them; what a format lacks is stood in for and not read."""
    masks = tiles.masks
    starts = masks if tiles.starts is None else tiles.starts
    return masks, tiles.values, starts, masks if tiles.scale is None else tiles.scale


def tile_constants(tiles: SparseTiles) -> dict[str, int | bool]:
    """What ``expand_tile`` wants to know when compiling."""
    return {
        "ROWS": tiles.tile.rows,
        "COLUMNS": tiles.tile.columns,
        "LONGEST": triton.next_power_of_2(tiles.longest),
        "PER_WORD": tiles.fixed_per_word,
        "UNIT": tiles.values_per_unit,
        "HAS_SCALE": tiles.scale is not None,
    }


def expand(tiles: SparseTiles, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] in ``dtype``."""
    kind = stored_type(dtype)
    out = torch.empty(tiles.out_features, tiles.in_features, dtype=kind, device=tiles.device)
    down, across = tiles.masks.shape[:2]
    shape = (tiles.out_features, tiles.in_features, across)
    launch(expand_kernel, (down * across,), out, *tile_arguments(tiles), *shape, **tile_constants(tiles))
    return out.to(dtype)
