"""Sparse weights as GPU kernels read them: tiles of rows x columns, each one contiguous run of packed values.

Repacked from the canonical ``SparseWeight`` at load. Tiles follow one another along the inputs, then along the output
rows, so that a program that owns some rows reads one unbroken stream. A tile is
- a mask, int32 [rows, columns / 32], input 32 w + b being bit b of word w (rows and inputs that do not exist: 0);
- its values, one per set bit in row-major order, padded with zeros to 16 bytes, so that every tile can be loaded in
  16-byte vectors.

Two layouts of the values: *fixed*, where n:m groups divide words of 32 inputs: each word has 32 n / m places, so that a
value's place follows from its word and the bits below it; *counted* for all others, with the tiles' starts beside.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paceline.kernels.formats.sparse import (
    FormatError,
    Pattern,
    SparseWeight,
    ValueDtype,
    unpack_bits,
    value_name,
)

WORD = 32
ALIGNMENT_BYTES = 16
#: Weights handled at once while packing: bounds the scratch memory (about 20 bytes each).
_SLAB_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class TileShape:
    """Output rows and inputs of a tile, powers of two.

    Raises:
        FormatError: not powers of two, fewer than 16 rows or columns than a word.
    """

    rows: int = 16
    columns: int = 128

    def __post_init__(self) -> None:
        for size, least in ((self.rows, 16), (self.columns, WORD)):
            if size < least or size & (size - 1):
                raise FormatError(
                    f"a tile has a power of two of rows (16 or more) and of columns ({WORD} or more), "
                    f"not {self.rows} x {self.columns}"
                )

    @classmethod
    def fitting(cls, in_features: int) -> "TileShape":
        """The widest tile that pads the inputs least: padding costs mask bytes."""
        return cls(columns=min((128, 64), key=lambda wide: -(-in_features // wide) * wide))


@dataclass(frozen=True, slots=True, eq=False)
class SparseTiles:
    """One sparse weight [out, in] in tiles.

    Attributes:
        masks: int32 [row tiles, column tiles, rows * columns / 32].
        values: [stored] in the value type, tile after tile.
        starts: int32 [tiles + 1], where tiles begin in ``values``, in units of 16 bytes; None where fixed.
        scale: fp32 [out] for int8, else None.
        longest: values of the longest tile, padding included.
    """

    pattern: Pattern
    out_features: int
    in_features: int
    tile: TileShape
    masks: Tensor
    values: Tensor
    starts: Tensor | None
    scale: Tensor | None
    longest: int
    _dense: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        return self.values.device

    @property
    def value_dtype(self) -> ValueDtype:
        """Type of the values."""
        return value_name(self.values.dtype)

    @property
    def fixed_per_word(self) -> int:
        """Places per mask word in the fixed layout, 0 in the counted one."""
        return 0 if self.starts is not None else WORD * self.pattern.n // self.pattern.m

    @property
    def values_per_unit(self) -> int:
        """Values in 16 bytes."""
        return ALIGNMENT_BYTES // self.values.element_size()

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts: what one pass over the weight reads."""
        parts = (self.masks, self.values, self.starts, self.scale)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def to(self, device: torch.device | str) -> "SparseTiles":
        """The same tiles on a device."""
        moved = {
            name: part.to(device)
            for name in ("masks", "values", "starts", "scale")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, **moved, _dense={})

    def unpack(self) -> SparseWeight:
        """The canonical form, bit for bit what was packed."""
        kept = self._untile(unpack_bits(_bytes(self.masks)).flatten(1))
        return SparseWeight.from_dense(self.stored(), kept, pattern=self.pattern, scale=self.scale)

    def stored(self) -> Tensor:
        """The values at their places and zeros elsewhere, [out, in] in the value type."""
        bits = unpack_bits(_bytes(self.masks)).view(-1, self.tile.rows * self.tile.columns)
        return self._untile(torch.where(bits, self.values[_places(bits, self)], 0))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], int8 dequantized in fp32 before it is rounded to ``dtype``."""
        stored = self.stored()
        return (stored if self.scale is None else stored.float() * self.scale[:, None]).to(dtype)

    def kept_dense(self, dtype: torch.dtype) -> Tensor:
        """``to_dense``, made once per type and kept: as much memory again as a dense weight."""
        if dtype not in self._dense:
            self._dense[dtype] = self.to_dense(dtype)
        return self._dense[dtype]

    def _untile(self, tiles: Tensor) -> Tensor:
        """[row tiles * column tiles, rows * columns], or any split of it -> [out, in]."""
        down, across = self.masks.shape[:2]
        whole = tiles.view(down, across, self.tile.rows, self.tile.columns).transpose(1, 2)
        return whole.reshape(down * self.tile.rows, -1)[: self.out_features, : self.in_features]


def pack_tiles(weight: SparseWeight, tile: TileShape | None = None) -> SparseTiles:
    """Repack a canonical weight.

    Args:
        tile: None takes ``TileShape.fitting``.

    Raises:
        FormatError: more values than 32-bit places can count.
    """
    tile = tile or TileShape.fitting(weight.in_features)
    fixed = weight.pattern.structured and WORD % weight.pattern.m == 0
    width = -(-weight.in_features // tile.columns) * tile.columns
    band = max(1, _SLAB_WEIGHTS // (width * tile.rows)) * tile.rows
    masks, values, counts = [], [], []
    for first in range(0, weight.out_features, band):
        bits, stored = _slab(weight, first, min(first + band, weight.out_features), tile)
        masks.append(_words(bits))
        packed, lengths = _pack_fixed(bits, stored, weight.pattern) if fixed else _pack_counted(bits, stored)
        values.append(packed)
        counts.append(lengths)
    lengths = torch.cat(counts)
    starts = None if fixed else torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    unit = ALIGNMENT_BYTES // weight.values.element_size()
    if int(lengths.sum()) * unit >= 1 << 31:
        raise FormatError(f"{weight.nnz} values are more than a weight in tiles can have")
    across = width // tile.columns
    # A weight of zeros alone still has something to point at.
    stored = torch.cat(values) if int(lengths.sum()) else weight.values.new_zeros(unit)
    return SparseTiles(
        weight.pattern,
        weight.out_features,
        weight.in_features,
        tile,
        torch.cat(masks).view(-1, across, tile.rows * tile.columns // WORD),
        stored,
        None if starts is None else starts.to(torch.int32),
        weight.scale,
        max(1, int(lengths.max())) * unit,
    )


def _slab(weight: SparseWeight, first: int, last: int, tile: TileShape) -> tuple[Tensor, Tensor]:
    """Rows ``first`` to ``last`` in tiles: bits and values, each [tiles, rows * columns]."""
    kept = unpack_bits(weight.bitmask[first:last])[:, : weight.in_features]
    dense = weight.values.new_zeros(kept.shape)
    dense[kept] = weight.row_values(first, last)
    return _tiled(kept, tile), _tiled(dense, tile)


def _tiled(part: Tensor, tile: TileShape) -> Tensor:
    """[rows, in] -> [tiles, rows * columns], zeros behind the ends."""
    down, across = -(-part.shape[0] // tile.rows), -(-part.shape[1] // tile.columns)
    whole = part.new_zeros(down * tile.rows, across * tile.columns)
    whole[: part.shape[0], : part.shape[1]] = part
    return whole.view(down, tile.rows, across, tile.columns).transpose(1, 2).reshape(down * across, -1)


def _pack_counted(bits: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Values of tiles, each padded to 16 bytes, and the tiles' lengths in units of 16 bytes."""
    unit = ALIGNMENT_BYTES // stored.element_size()
    lengths = -(-bits.sum(1) // unit)
    begins = (lengths.cumsum(0) - lengths) * unit
    places = begins[:, None] + bits.cumsum(1) - 1
    packed = stored.new_zeros(int(lengths.sum()) * unit)
    packed[places[bits]] = stored[bits]
    return packed, lengths


def _pack_fixed(bits: Tensor, stored: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """As ``_pack_counted``, every word having the same number of places."""
    per_word = WORD * pattern.n // pattern.m
    words, values = bits.view(-1, WORD), stored.view(-1, WORD)
    places = torch.arange(len(words), device=bits.device)[:, None] * per_word + words.cumsum(1) - 1
    packed = stored.new_zeros(len(words) * per_word)
    packed[places[words]] = values[words]
    unit = ALIGNMENT_BYTES // stored.element_size()
    assert packed.numel() % (len(bits) * unit) == 0, "tiles of whole 16-byte units"
    return packed, torch.full((len(bits),), packed.numel() // (len(bits) * unit), device=bits.device)


def _places(bits: Tensor, tiles: SparseTiles) -> Tensor:
    """Index in ``values`` of every weight, int64 like ``bits`` [tiles, rows * columns]; 0 where no bit is set."""
    if tiles.starts is not None:
        begins = tiles.starts[:-1, None].long() * tiles.values_per_unit
        places = begins + bits.cumsum(1) - 1
    else:
        words = bits.view(-1, WORD)
        first = torch.arange(len(words), device=bits.device)[:, None] * tiles.fixed_per_word
        places = (first + words.cumsum(1) - 1).view(bits.shape)
    return torch.where(bits, places, 0)


def _words(bits: Tensor) -> Tensor:
    """bool [tiles, rows * columns] -> int32 [tiles, rows * columns / 32], lowest bit first."""
    shifts = torch.arange(WORD, dtype=torch.int64, device=bits.device)
    words = (bits.view(len(bits), -1, WORD).long() << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _bytes(words: Tensor) -> Tensor:
    """int32 [..., words] -> uint8 [..., words, 4], lowest byte first on any machine."""
    shifts = torch.arange(0, WORD, 8, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8)
