"""Packs sparse weights for the CPU kernels: the tiles of the dense formats, with what is not kept left out."""

import torch
from torch import Tensor

from paceline.kernels.cpu.int8 import quantize_rows
from paceline.kernels.cpu.library import best_isa
from paceline.kernels.formats.cpu_picks import is_compact, pick, picks_for
from paceline.kernels.formats.cpu_tiles import compress
from paceline.kernels.formats.packed import (
    INT8_OFFSET,
    LANES,
    PER_LANE,
    Format,
    PackedLinear,
    pad_rows,
    padded,
    sparse_padding,
)

#: Those with an instruction that picks 64 bytes by number.
_PICKING_ISAS = ("avx512", "amx")
_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int16}


def pack_sparse(
    values: Tensor,
    kept: Tensor,
    format: Format,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    picked: bool | None = None,
) -> PackedLinear:
    """Pack a weight.

    Args:
        values: [out, in] of any float type, zero where nothing is kept; or int8 as stored, with its ``scale``.
        kept: bool [out, in].
        format: of the packed values; floats are rounded to it, int8 per output row.
        scale: of int8 values, fp32 [out]; None for floats.
        bias: [out] of any float type.
        picked: store int8 weights with the numbers of their inputs, if no row keeps more than 16 of 64; None: where
            this machine's kernels are fast with them, and they take not much more than masks.
    """
    if format == "int8" and scale is None:
        values, scale = quantize_rows(values)
    elif scale is not None and format != "int8":
        values, scale = values.float() * scale[:, None], None
    out, width = values.shape
    per_lane = PER_LANE[format]
    shape = (padded(out, LANES), padded(width, sparse_padding(format)))
    whole, mask = torch.zeros(shape, dtype=_STORED[format]), torch.zeros(shape, dtype=torch.bool)
    whole[:out, :width] = values
    mask[:out, :width] = kept
    picks = 0 if picked is False or format != "int8" else picks_for(mask)
    if picked is None and not (picks and best_isa() in _PICKING_ISAS and is_compact(mask, picks)):
        picks = 0
    if picks:
        data, starts = pick(whole, mask, picks)
    else:
        if format == "int8":
            whole = (whole + INT8_OFFSET).to(torch.uint8)
        data, starts = compress(_vectors(whole, per_lane), _vectors(mask, per_lane))
    return PackedLinear(
        format,
        out,
        width,
        data,
        None if scale is None else pad_rows(scale),
        None if bias is None else pad_rows(bias.float()),
        starts,
        picks,
    )


def _vectors(rows: Tensor, per_lane: int) -> Tensor:
    """[rows, in] -> [tiles, in / per lane, 16 * per lane]."""
    tiles = rows.view(-1, LANES, rows.shape[1] // per_lane, per_lane)
    return tiles.transpose(1, 2).flatten(2).contiguous()
