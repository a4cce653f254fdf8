"""Sparse tiles as the CPU kernels read them: 16 output rows, cut into vectors of 64 bytes as they are when dense.

A group of 16 vectors is its masks, one bit per value, and then the values of the set bits; ``csrc/paceline_cpu.h`` has
the layout. Only bytes are moved here: what a value means is ``packed``'s and ``cpu.sparse``'s business.
"""

import torch
from torch import Tensor

#: Vectors per group.
VECTORS = 16
#: Bytes behind the last value that a kernel may read.
TAIL_BYTES = 64
_VECTOR_BYTES = 64
_BITS_PER_BYTE = 8


def compress(vectors: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out what is not kept.

    Args:
        vectors: [tiles, vectors, values per vector] in an element type of 1, 2 or 4 bytes; whole groups.
        kept: bool, of the same shape.

    Returns:
        uint8 [bytes], and where each tile begins in it, int64 [tiles + 1].
    """
    tiles, count, width = vectors.shape
    size = _VECTOR_BYTES // width
    groups = kept.view(tiles * count // VECTORS, VECTORS * width)
    masks = _bytes_of(groups)
    values_of = groups.sum(1)
    bytes_of = masks.shape[1] + values_of * size
    ends = bytes_of.cumsum(0)
    firsts = ends - bytes_of
    data = torch.zeros(int(ends[-1]) + TAIL_BYTES, dtype=torch.uint8)
    data[firsts[:, None] + torch.arange(masks.shape[1])] = masks
    # The i-th kept value of all goes behind the masks of its group and the group's earlier values.
    before = values_of.cumsum(0) - values_of
    places = (firsts + masks.shape[1]) // size - before
    index = torch.repeat_interleave(places, values_of) + torch.arange(int(values_of.sum()))
    whole = data[: len(data) // size * size].view(vectors.dtype)
    whole[index] = vectors[kept]
    per_tile = count // VECTORS
    starts = torch.cat([firsts[::per_tile], ends[-1:]])
    return data, starts


def expand(data: Tensor, starts: Tensor, vectors: int, dtype: torch.dtype, absent: int) -> Tensor:
    """The vectors again: [tiles, vectors, values per vector], ``absent`` where nothing was kept.

    Args:
        data, starts: as ``compress`` gives them.
        vectors: per tile.
        dtype: of the values.
    """
    width = _VECTOR_BYTES // dtype.itemsize
    mask_bytes = VECTORS * width // _BITS_PER_BYTE
    tiles, groups = len(starts) - 1, vectors // VECTORS
    values = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    result = torch.full((tiles, groups, VECTORS * width), absent, dtype=dtype)
    at = starts[:-1].clone()
    for group in range(groups):  # in step over all tiles: a group begins where the one before it ends
        kept = _bits_of(data[at[:, None] + torch.arange(mask_bytes)])
        ranks = kept.cumsum(1) - 1
        index = (at + mask_bytes)[:, None] // dtype.itemsize + ranks
        result[:, group][kept] = values[index[kept]]
        at += mask_bytes + kept.sum(1) * dtype.itemsize
    return result.view(tiles, vectors, width)


def _bytes_of(bits: Tensor) -> Tensor:
    places = torch.tensor([1 << bit for bit in range(_BITS_PER_BYTE)], dtype=torch.uint8)
    return (bits.view(len(bits), -1, _BITS_PER_BYTE).to(torch.uint8) * places).sum(-1, dtype=torch.uint8)


def _bits_of(packed: Tensor) -> Tensor:
    places = torch.arange(_BITS_PER_BYTE, dtype=torch.uint8)
    return ((packed[..., None] >> places) & 1).bool().flatten(1)
