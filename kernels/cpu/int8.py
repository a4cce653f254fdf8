"""Dense int8 as artifacts store it: values [out, in] and one fp32 scale per output row, packed without rounding again.

Symmetric, values in [-127, 127]; a weight is value * scale. ``quantize_rows`` rounds as ``csrc/pack.cpp`` does, so that
quantizing before or after storing gives the same bits.
"""

import torch
from torch import Tensor

from paceline.kernels.formats.packed import (
    GROUP,
    INT8_OFFSET,
    LANES,
    PER_LANE,
    PackedLinear,
    pad_rows,
    padded,
)

_TOP = 127.0


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] of any float type.

    Returns:
        values int8 [out, in] and scales fp32 [out]; rows of zeros have scale 0.
    """
    weight = weight.detach().float().cpu()
    top = weight.abs().amax(dim=1)
    # Tensors, not numbers: torch may multiply by the reciprocal of a number, which rounds differently.
    limit = torch.full_like(top, _TOP)
    inverse = torch.where(top > 0, limit / top, 0.0)
    return (weight * inverse[:, None]).round().to(torch.int8), top / limit


def pack_rows(values: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack quantized rows as they are: int8 [out, in], fp32 [out] and a bias [out] of any float type."""
    out, width = values.shape
    whole = torch.full((padded(out, LANES), padded(width, GROUP)), INT8_OFFSET, dtype=torch.uint8)
    whole[:out, :width] = (values.to(torch.int16) + INT8_OFFSET).to(torch.uint8)
    tiles = whole.view(-1, LANES, whole.shape[1] // PER_LANE["int8"], PER_LANE["int8"]).transpose(1, 2)
    data = tiles.contiguous().view(-1)
    return PackedLinear(
        "int8", out, width, data, pad_rows(scale), None if bias is None else pad_rows(bias.float())
    )
