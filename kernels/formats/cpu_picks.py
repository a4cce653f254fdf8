"""Sparse int8 tiles of rows that keep equally many weights of every 64 inputs, as n:m patterns do.

Each weight lies beside the number of its input in the group (``csrc/paceline_cpu.h`` has the layout), so that a kernel
picks inputs, 64 by one instruction, and expands nothing. A weight takes two bytes, where masks take one and an eighth
of a byte for every weight of the dense row: a third more at 16 of 64, and as much at 8 of 64.
"""

import torch
from torch import Tensor

from paceline.kernels.formats.cpu_tiles import TAIL_BYTES

_LANES = 16
_GROUP = 64
_PER_LANE = 4
#: With more picks per group a pass over them costs as much as over a dense row.
MOST_PICKS = 16
#: Picked weights may take so much more than masks and values: a third at 16 of 64, and room for rows of padding.
_MOST_MORE = 1.5
#: Whole tiles; sorting takes nine bytes for every weight.
_ROWS_AT_ONCE = 64


def picks_for(kept: Tensor) -> int:
    """Most weights that a row keeps per group, rounded up to a multiple of 4; 0: none, or more than can be picked.

    Args:
        kept: bool [rows, in], whole groups of 64 inputs.
    """
    picks = -(-int(_counts(kept).max()) // _PER_LANE) * _PER_LANE
    return picks if picks <= MOST_PICKS else 0


def is_compact(kept: Tensor, picks: int) -> bool:
    """Whether picked weights take not much more than masks and values: rows keep about as many in every group."""
    counts = _counts(kept)
    return 2 * picks * counts.numel() <= _MOST_MORE * (int(counts.sum()) + kept.numel() // 8)


def pick(values: Tensor, kept: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """Pack rows of which no group keeps more than ``picks`` weights; where it is fewer, zeros fill up.

    Args:
        values: [rows, in] in [-127, 127]; rows a multiple of 16, in of 64.
        kept: bool, of the same shape.

    Returns:
        uint8 [bytes], and where each tile begins in it, int64 [tiles + 1].
    """
    rows, width = values.shape
    starts = torch.arange(rows // _LANES + 1) * (2 * picks * _LANES * (width // _GROUP))
    parts = zip(torch.split(values, _ROWS_AT_ONCE), torch.split(kept, _ROWS_AT_ONCE), strict=True)
    tiles = [_pairs(some, mask, picks) for some, mask in parts]
    return torch.cat([*tiles, torch.zeros(TAIL_BYTES, dtype=torch.uint8)]), starts


def unpick(data: Tensor, picks: int, width: int) -> Tensor:
    """What was packed: int16 [padded rows, ``width``], zeros where nothing was kept."""
    groups = width // _GROUP
    pairs = data[:-TAIL_BYTES].view(-1, groups, picks // _PER_LANE, 2, _LANES, _PER_LANE)
    weights, numbers = (part.permute(0, 3, 1, 2, 4).reshape(-1, groups, picks) for part in pairs.unbind(3))
    rows = torch.zeros(len(weights), groups, _GROUP, dtype=torch.int16)
    rows.scatter_(-1, numbers.long(), weights.contiguous().view(torch.int8).to(torch.int16))
    return rows.view(-1, width)


def _pairs(values: Tensor, kept: Tensor, picks: int) -> Tensor:
    """Whole tiles, as bytes."""
    groups = kept.view(len(kept), -1, _GROUP)
    numbers = torch.sort((~groups).to(torch.uint8), dim=-1, stable=True).indices[..., :picks]
    weights = torch.where(groups, values.view(len(kept), -1, _GROUP), 0).gather(-1, numbers).to(torch.int8)
    return torch.stack([_lanes(weights.view(torch.uint8)), _lanes(numbers.to(torch.uint8))], dim=3).flatten()


def _counts(kept: Tensor) -> Tensor:
    return kept.view(len(kept), -1, _GROUP).sum(-1)


def _lanes(parts: Tensor) -> Tensor:
    """[rows, groups, picks] -> [tiles, groups, picks / 4, 16 * 4]."""
    rows, groups, picks = parts.shape
    tiles = parts.view(rows // _LANES, _LANES, groups, picks // _PER_LANE, _PER_LANE)
    return tiles.permute(0, 2, 3, 1, 4).reshape(-1, groups, picks // _PER_LANE, _LANES * _PER_LANE)
