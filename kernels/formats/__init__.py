"""Weight formats of linear layers: ``packed`` for the CPU kernels, ``sparse`` as artifacts store it."""

from paceline.kernels.formats.packed import (
    FORMATS,
    GROUP,
    LANES,
    Format,
    PackedLinear,
    interleave_rows,
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
    "SparseWeight",
    "ValueDtype",
    "interleave_rows",
    "keep_at_least",
    "pad_rows",
    "padded",
]
