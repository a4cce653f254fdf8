"""Linear layers as the CPU kernels read them: how many bytes that takes, how to get the values back.

A ``PackedLinear`` holds output rows in tiles of 16 (see ``cpu/csrc/paceline_cpu.h``); packing is done by
``cpu.library``. int8 is symmetric with one scale per output row and is meant for activations that are quantized in
groups of 64 inputs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Format = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
LANES = 16
GROUP = 64
_INPUT_PADDING = {"fp32": 4, "bf16": 4, "int8": GROUP}
_ELEMENT = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}


def padded(n: int, to: int) -> int:
    """``n`` rounded up to a multiple of ``to``."""
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear layer, y = x W^T + bias.

    Attributes:
        data: uint8 [bytes], tiles of 16 output rows.
        scale: fp32 [padded out] for int8, else None.
        bias: fp32 [padded out] or None.
    """

    format: Format
    out_features: int
    in_features: int
    data: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_padded(self) -> int:
        """Inputs per row as stored."""
        return padded(self.in_features, _INPUT_PADDING[self.format])

    @property
    def num_bytes(self) -> int:
        """Bytes that one forward reads."""
        parts = [self.data, self.scale, self.bias]
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def unpack(self) -> Tensor:
        """The weight as fp32 [out, in]; int8 comes dequantized."""
        per_lane = {"fp32": 1, "bf16": 2, "int8": 4}[self.format]
        tiles = padded(self.out_features, LANES) // LANES
        stored = self.data.view(_ELEMENT[self.format]).view(
            tiles, self.in_padded // per_lane, LANES, per_lane
        )
        rows = stored.permute(0, 2, 1, 3).reshape(tiles * LANES, self.in_padded).float()
        if self.scale is not None:
            rows = (rows - 128.0) * self.scale[:, None]
        return rows[: self.out_features, : self.in_features]


def pad_rows(values: Tensor) -> Tensor:
    """fp32 [out] -> contiguous fp32 [padded out], zeros behind."""
    out = torch.zeros(padded(len(values), LANES))
    out[: len(values)] = values
    return out


def interleave_rows(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up [ffn, ...] in alternating tiles of 16 rows, each padded with zeros: [2 * padded ffn, ...]."""
    rows = padded(len(gate), LANES)
    shape = (rows // LANES, LANES, *gate.shape[1:])
    tiles = []
    for part in (gate, up):
        whole = part.new_zeros(rows, *gate.shape[1:])
        whole[: len(part)] = part
        tiles.append(whole.view(shape))
    return torch.stack(tiles, dim=1).reshape(2 * rows, *gate.shape[1:])
