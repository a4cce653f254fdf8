"""Sparse linears for the CPU kernels, packed from values and a mask."""

import torch
from torch import Tensor

from paceline.kernels.cpu.int8 import pack_rows
from paceline.kernels.formats import LANES, Format, PackedLinear, pad_rows, padded

_PADDED_TO = 4


def pack_sparse(
    values: Tensor, kept: Tensor, format: Format, scale: Tensor | None, bias: Tensor | None
) -> PackedLinear:
    """Pack one sparse linear.

    Args:
        values: [out, in], int8 as stored for int8, else of any float type; zero where it is not kept.
        kept: bool [out, in].
        format: what it computes in.
        scale: fp32 [out] for int8, else None.
        bias: [out] of any float type.
    """
    values = values.masked_fill(~kept, 0)
    if scale is not None:
        return pack_rows(values, scale, bias)
    assert format != "int8"
    out, width = values.shape
    per_lane = 2 if format == "bf16" else 1
    whole = torch.zeros(padded(out, LANES), padded(width, _PADDED_TO))
    whole[:out, :width] = values
    tiles = whole.view(-1, LANES, whole.shape[1] // per_lane, per_lane).transpose(1, 2)
    data = tiles.to(torch.bfloat16 if format == "bf16" else torch.float32).contiguous().view(-1)
    return PackedLinear(
        format, out, width, data.view(torch.uint8), None, None if bias is None else pad_rows(bias.float())
    )
