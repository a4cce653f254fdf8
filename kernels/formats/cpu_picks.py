"""Sparse int8 tiles of rows that keep equally many weights of every 64 inputs, as n:m patterns do.

Each weight lies beside the number of its input in the group (``csrc/paceline_cpu.h`` has the layout), so that a kernel
picks inputs, 64 by one instruction, and expands nothing. A weight takes two bytes, at 16 of 64 a quarter less, where
masks take one and an eighth of a byte for every weight of the dense row: a sixth more at 16 of 64, and as much at 8.
"""

import torch
from torch import Tensor

from paceline.kernels.formats.cpu_tiles import TAIL_BYTES

_LANES = 16
_GROUP = 64
_PER_LANE = 4
_VECTOR = _LANES * _PER_LANE
#: With more picks per group a pass over them costs as much as over a dense row.
MOST_PICKS = 16
#: Vectors of numbers in a group: those of a fourth one stand in two spare bits of each of the others.
_NUMBERED = 3
#: Picked weights may take so much more than masks and values: a sixth at 16 of 64, and room for rows of padding.
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
    return _group_bytes(picks) // _LANES * counts.numel() <= _MOST_MORE * (
        int(counts.sum()) + kept.numel() // 8
    )


def pick(values: Tensor, kept: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """Pack rows of which no group keeps more than ``picks`` weights; where it is fewer, zeros fill up.

    Args:
        values: [rows, in] in [-127, 127]; rows a multiple of 16, in of 64.
        kept: bool, of the same shape.

    Returns:
        uint8 [bytes], and where each tile begins in it, int64 [tiles + 1].
    """
    rows, width = values.shape
    starts = torch.arange(rows // _LANES + 1) * (_group_bytes(picks) * (width // _GROUP))
    parts = zip(torch.split(values, _ROWS_AT_ONCE), torch.split(kept, _ROWS_AT_ONCE), strict=True)
    tiles = [_tiles(some, mask, picks) for some, mask in parts]
    return torch.cat([*tiles, torch.zeros(TAIL_BYTES, dtype=torch.uint8)]), starts


def unpick(data: Tensor, picks: int, width: int) -> Tensor:
    """What was packed: int16 [padded rows, ``width``], zeros where nothing was kept."""
    groups = width // _GROUP
    stored = data[:-TAIL_BYTES].view(-1, groups, _group_bytes(picks) // _VECTOR, _VECTOR)
    weights, numbers = stored[:, :, 0::2], stored[:, :, 1::2]
    if weights.shape[2] > _NUMBERED:
        fourth = [numbers[:, :, k] >> 6 << 2 * k for k in range(_NUMBERED)]
        numbers = torch.cat([numbers & 63, torch.stack(fourth).sum(0, dtype=torch.uint8).unsqueeze(2)], 2)
    rows = torch.zeros(len(stored) * _LANES, groups, _GROUP, dtype=torch.int16)
    rows.scatter_(
        -1, _of_rows(numbers).long(), _of_rows(weights).contiguous().view(torch.int8).to(torch.int16)
    )
    return rows.view(-1, width)


def _group_bytes(picks: int) -> int:
    """Of a tile's rows in one group."""
    vectors = picks // _PER_LANE
    return _VECTOR * (vectors + min(vectors, _NUMBERED))


def _tiles(values: Tensor, kept: Tensor, picks: int) -> Tensor:
    """Whole tiles, as bytes."""
    groups = kept.view(len(kept), -1, _GROUP)
    numbers = torch.sort((~groups).to(torch.uint8), dim=-1, stable=True).indices[..., :picks]
    weights = torch.where(groups, values.view(len(kept), -1, _GROUP), 0).gather(-1, numbers).to(torch.int8)
    vectors, places = _lanes(weights.view(torch.uint8)), _lanes(numbers.to(torch.uint8))
    if vectors.shape[2] <= _NUMBERED:
        return torch.stack([vectors, places], dim=3).flatten()
    fourth = places[:, :, _NUMBERED]
    places = torch.stack([places[:, :, k] | (fourth >> 2 * k << 6) for k in range(_NUMBERED)], 2)
    pairs = torch.stack([vectors[:, :, :_NUMBERED], places], dim=3).flatten(2)
    return torch.cat([pairs, vectors[:, :, _NUMBERED]], 2).flatten()


def _counts(kept: Tensor) -> Tensor:
    return kept.view(len(kept), -1, _GROUP).sum(-1)


def _lanes(parts: Tensor) -> Tensor:
    """[rows, groups, picks] -> [tiles, groups, picks / 4, 16 * 4]."""
    rows, groups, picks = parts.shape
    tiles = parts.view(rows // _LANES, _LANES, groups, picks // _PER_LANE, _PER_LANE)
    return tiles.permute(0, 2, 3, 1, 4).reshape(-1, groups, picks // _PER_LANE, _LANES * _PER_LANE)


def _of_rows(vectors: Tensor) -> Tensor:
    """[tiles, groups, picks / 4, 16 * 4] -> [rows, groups, picks]."""
    tiles, groups, count, _ = vectors.shape
    lanes = vectors.reshape(tiles, groups, count, _LANES, _PER_LANE)
    return lanes.permute(0, 3, 1, 2, 4).reshape(-1, groups, count * _PER_LANE)
