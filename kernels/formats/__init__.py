"""Weight formats of linear layers: ``packed`` for CPUs, ``sparse`` as artifacts store it, ``tiles`` for GPUs."""

from paceline.kernels.formats.gpu_tiles import SparseTiles, TileShape, pack_tiles
from paceline.kernels.formats.packed import (
    FORMATS,
    GROUP,
    LANES,
    Format,
    PackedLinear,
    interleave_rows,
    packed_bytes,
    pad_rows,
    padded,
)
from paceline.kernels.formats.sparse import (
    VALUE_DTYPES,
    FormatError,
    Pattern,
    SparseWeight,
    ValueDtype,
    keep_at_least,
)

__all__ = [
    "FORMATS",
    "GROUP",
    "LANES",
    "VALUE_DTYPES",
    "Format",
    "FormatError",
    "PackedLinear",
    "Pattern",
    "SparseTiles",
    "SparseWeight",
    "TileShape",
    "ValueDtype",
    "interleave_rows",
    "keep_at_least",
    "pack_tiles",
    "packed_bytes",
    "pad_rows",
    "padded",
]
