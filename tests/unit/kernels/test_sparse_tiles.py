"""The layout of sparse weights for GPUs: bit for bit what was packed, in the bytes it says, aligned as promised."""

import pytest
import torch
from triton_kernels import PATTERNS, random_sparse

from paceline.kernels.formats import FormatError, Pattern, SparseWeight, TileShape, gpu_tiles, pack_tiles
from paceline.kernels.formats.sparse import VALUE_DTYPES, ValueDtype, unpack_bits

SHAPES = [(1, 64), (16, 128), (17, 192), (37, 320)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(pattern: str, dtype: ValueDtype, shape: tuple[int, int]) -> None:
    weight = random_sparse(*shape, pattern=pattern, dtype=dtype)
    packed = pack_tiles(weight)
    back = packed.unpack()
    for name in ("bitmask", "values", "row_offsets", "scale"):
        own, wanted = getattr(back, name), getattr(weight, name)
        assert own is wanted if wanted is None else torch.equal(own, wanted), name
    assert (back.pattern, back.in_features) == (weight.pattern, weight.in_features)
    assert torch.equal(packed.to_dense(), weight.to_dense())


@pytest.mark.parametrize("columns", [32, 64, 256])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_tile_shape(columns: int, pattern: str) -> None:
    weight = random_sparse(21, 192, pattern=pattern, dtype="int8")
    packed = pack_tiles(weight, TileShape(32, columns))
    assert torch.equal(packed.unpack().values, weight.values)
    assert packed.masks.shape == (1, -(-192 // columns), 32 * columns // 32)


def test_widths_that_are_no_whole_words() -> None:
    for width in (1, 31, 33, 77):
        weight = random_sparse(5, width)
        assert torch.equal(pack_tiles(weight).to_dense(), weight.to_dense())
    two_of_four = random_sparse(5, 36, pattern="2:4")
    assert torch.equal(pack_tiles(two_of_four).to_dense(), two_of_four.to_dense())


def test_empty_rows_and_nothing_at_all() -> None:
    weight = torch.zeros(20, 64)
    weight[3, 5] = 2.0
    for some in (weight, torch.zeros(20, 64)):
        packed = pack_tiles(SparseWeight.from_dense(some))
        assert torch.equal(packed.to_dense(), some)
        assert packed.longest >= 4  # something to load from, even if nothing is stored


def test_large_weights_are_packed_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {pattern: pack_tiles(random_sparse(70, 192, pattern=pattern)) for pattern in PATTERNS}
    monkeypatch.setattr(gpu_tiles, "_SLAB_WEIGHTS", 192 * 16)
    for pattern, wanted in whole.items():
        packed = pack_tiles(random_sparse(70, 192, pattern=pattern))
        assert torch.equal(packed.values, wanted.values)
        assert torch.equal(packed.masks, wanted.masks)
        if packed.starts is None or wanted.starts is None:
            assert packed.starts is wanted.starts
        else:
            assert torch.equal(packed.starts, wanted.starts)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_tiles_are_aligned_and_bytes_exact(dtype: ValueDtype) -> None:
    counted = pack_tiles(random_sparse(40, 256, dtype=dtype))
    assert counted.starts is not None
    size = counted.values.element_size()
    bits = unpack_bits(gpu_tiles._bytes(counted.masks)).view(-1, 16 * 128).sum(1)
    lengths = counted.starts.diff() * 16  # bytes
    assert ((lengths >= bits * size) & (lengths < bits * size + 16)).all()
    assert int(counted.starts[-1]) * 16 == counted.values.numel() * size
    assert counted.longest * size == int(lengths.max())
    scale = 0 if counted.scale is None else 40 * 4
    masks = 3 * 2 * 16 * 128 // 8
    assert counted.num_bytes == masks + int(lengths.sum()) + counted.starts.numel() * 4 + scale

    fixed = pack_tiles(random_sparse(32, 256, pattern="16:32", dtype=dtype))
    assert fixed.starts is None
    assert fixed.values.numel() == 32 * 128
    assert (fixed.fixed_per_word, counted.fixed_per_word) == (16, 0)
    assert fixed.values_per_unit * size == 16


def test_which_patterns_have_fixed_places() -> None:
    for pattern, per_word in (("2:4", 16), ("16:32", 16), ("1:8", 4), ("16:64", 0), ("unstructured", 0)):
        assert pack_tiles(random_sparse(3, 128, pattern=pattern)).fixed_per_word == per_word


def test_the_tile_that_pads_least_is_taken() -> None:
    assert [TileShape.fitting(width).columns for width in (576, 1536, 64, 4096, 100)] == [
        64,
        128,
        64,
        128,
        128,
    ]
    for rows, columns in ((8, 128), (16, 16), (24, 128), (16, 96)):
        with pytest.raises(FormatError, match=f"not {rows} x {columns}"):
            TileShape(rows, columns)


def test_stored_zeros_stay_values() -> None:
    kept = torch.zeros(2, 64, dtype=torch.bool)
    kept[0, :5] = True
    packed = pack_tiles(SparseWeight.from_dense(torch.zeros(2, 64), kept, pattern=Pattern()))
    assert torch.equal(packed.unpack().kept(), kept)
