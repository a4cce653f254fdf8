"""Linear layers as the CPU kernels read them: how many bytes that takes, how to get the values back.

A ``PackedLinear`` holds output rows in tiles of 16 (see ``cpu/csrc/paceline_cpu.h``), dense or sparse; packing is done
by ``cpu.library`` and ``cpu.sparse``. int8 is symmetric with one scale per output row and is meant for activations that
are quantized in groups of 64 inputs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from paceline.kernels.formats.cpu_picks import unpick
from paceline.kernels.formats.cpu_tiles import TAIL_BYTES, VECTORS, expand

Format = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
LANES = 16
GROUP = 64
#: Inputs of one output row that lie side by side in a tile.
PER_LANE: dict[Format, int] = {"fp32": 1, "bf16": 2, "int8": 4}
#: int8 is stored as unsigned bytes, see ``csrc/paceline_cpu.h``.
INT8_OFFSET = 128
_INPUT_PADDING = {"fp32": 4, "bf16": 4, "int8": GROUP}
_ELEMENT = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}


def padded(n: int, to: int) -> int:
    """``n`` rounded up to a multiple of ``to``."""
    return -(-n // to) * to


def sparse_padding(format: Format) -> int:
    """Inputs per group of a sparse tile; rows are padded to whole groups."""
    return VECTORS * PER_LANE[format]


def packed_bytes(out: int, width: int, format: Format, *, bias: bool = False, kept: float = 1.0) -> int:
    """``PackedLinear.num_bytes`` of a linear that need not exist, from its shape alone.

    Exact for dense weights; for sparse ones with masks exact if ``kept`` x out x width is a whole number of values.

    Args:
        width: inputs.
        kept: share of the weights that a sparse one keeps; 1 is a dense weight.
    """
    rows, element = padded(out, LANES), _ELEMENT[format].itemsize
    beside = 4 * rows * ((format == "int8") + bias)
    if kept == 1.0:
        return rows * padded(width, _INPUT_PADDING[format]) * element + beside
    masks = rows * padded(width, sparse_padding(format)) // 8
    starts = 8 * (rows // LANES + 1)
    return masks + round(kept * out * width) * element + TAIL_BYTES + starts + beside


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear layer, y = x W^T + bias.

    Attributes:
        data: uint8 [bytes], tiles of 16 output rows.
        scale: fp32 [padded out] for int8, else None.
        bias: fp32 [padded out] or None.
        tile_starts: of a sparse weight, the bytes from ``data`` to each tile and to the end, int64 [tiles + 1]; None is
            a dense one.
        picks: weights that each row keeps of every 64 inputs, if they are stored with the inputs' numbers; else 0.
    """

    format: Format
    out_features: int
    in_features: int
    data: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    tile_starts: Tensor | None = None
    picks: int = 0

    @property
    def in_padded(self) -> int:
        """Inputs per row as stored."""
        dense = self.tile_starts is None
        return padded(self.in_features, _INPUT_PADDING[self.format] if dense else sparse_padding(self.format))

    @property
    def num_bytes(self) -> int:
        """Bytes that one forward reads."""
        parts = [self.data, self.scale, self.bias, self.tile_starts]
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def unpack(self) -> Tensor:
        """The weight as fp32 [out, in]; int8 comes dequantized."""
        rows = self.stored().float()
        if self.scale is not None:
            rows = rows * self.scale[: self.out_features, None]
        return rows[:, : self.in_features]

    def stored(self) -> Tensor:
        """The values as stored, in ``in_padded`` columns: [out, in padded] in fp32, bf16 or (int8) int16."""
        if self.picks:
            return unpick(self.data, self.picks, self.in_padded)[: self.out_features]
        per_lane, element = PER_LANE[self.format], _ELEMENT[self.format]
        tiles, vectors = padded(self.out_features, LANES) // LANES, self.in_padded // per_lane
        if self.tile_starts is None:
            lanes = self.data.view(element)
        else:
            absent = INT8_OFFSET if self.format == "int8" else 0
            lanes = expand(self.data, self.tile_starts, vectors, element, absent)
        rows = lanes.view(tiles, vectors, LANES, per_lane).transpose(1, 2)
        rows = rows.reshape(tiles * LANES, self.in_padded)[: self.out_features]
        return rows.to(torch.int16) - INT8_OFFSET if self.format == "int8" else rows


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
