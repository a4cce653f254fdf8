"""Sparse products by Triton's interpreter against float64, over formats, types and edge shapes; and what they load."""

import pytest
import torch
from triton_kernels import FLOATS, PATTERNS, random_sparse

from paceline.kernels import ops, reference
from paceline.kernels.formats import SparseTiles, SparseWeight, TileShape, pack_tiles
from paceline.kernels.formats.sparse import VALUE_DTYPES, ValueDtype
from paceline.kernels.gpu import runtime
from paceline.kernels.gpu.table import Plan

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_KERNELS", "triton")
    runtime.forget_launches()


def assert_close(
    x: torch.Tensor, tiles: SparseTiles, y: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Within the bound of fp32 summation, and of rounding to the output's type."""
    assert (y.dtype, y.shape) == (x.dtype, (len(x), tiles.out_features))
    exact = reference.sparse_linear(x.double().to(x.dtype).double(), tiles, bias)
    terms = x.double().abs() @ tiles.to_dense(torch.float64).abs().T
    terms += 0 if bias is None else bias.double().abs()
    unit = torch.finfo(x.dtype).eps / 2
    allowed = terms * tiles.in_features * 2.0**-24 + exact.abs() * unit * 1.01 + 1e-30
    assert ((y.double() - exact).abs() <= allowed).all()


def product(
    x: torch.Tensor, tiles: SparseTiles, plan: Plan, bias: torch.Tensor | None = None
) -> torch.Tensor:
    made = runtime.load("sparse_linear", "cpu").sparse_linear(x, tiles, bias, plan)
    assert isinstance(made, torch.Tensor)
    return made


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_format_for_one_row_and_several(pattern: str, dtype: ValueDtype, rows: int) -> None:
    tiles = pack_tiles(random_sparse(19, 64, pattern=pattern, dtype=dtype))
    x = torch.randn(rows, 64).to(FLOATS["bf16" if dtype == "int8" else dtype])
    y = ops.sparse_linear(x, tiles)
    assert y.abs().max() > 1
    assert_close(x, tiles, y)
    assert runtime.launches() == {"gemv_kernel" if rows == 1 else "gemm_kernel": 1}


@pytest.mark.parametrize("rows", [*range(1, 17)])
def test_every_small_number_of_rows(rows: int) -> None:
    tiles = pack_tiles(random_sparse(16, 40, dtype="bf16"))
    x = torch.randn(rows, 40, dtype=torch.bfloat16)
    assert_close(x, tiles, ops.sparse_linear(x, tiles))


@pytest.mark.parametrize(("out", "width"), [(1, 1), (1, 200), (33, 31), (5, 129), (48, 64)])
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_sizes(out: int, width: int, rows: int) -> None:
    tiles = pack_tiles(random_sparse(out, width, dtype="fp16", sparsity=0.3))
    x, bias = torch.randn(rows, width).half(), torch.randn(out).half()
    assert_close(x, tiles, ops.sparse_linear(x, tiles, bias), bias)


@pytest.mark.parametrize("rows", [1, 4])
def test_empty_rows_nothing_and_everything(rows: int) -> None:
    some = torch.randn(20, 70)
    some[[0, 7, 19]] = 0
    x = torch.randn(rows, 70)
    for dense in (some, torch.zeros(20, 70), torch.randn(20, 70)):
        tiles = pack_tiles(SparseWeight.from_dense(dense))
        y = ops.sparse_linear(x, tiles)
        assert_close(x, tiles, y)
        assert (y[:, (dense == 0).all(1)] == 0).all()


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_activation_with_any_value(values: ValueDtype, x_dtype: torch.dtype) -> None:
    tiles = pack_tiles(random_sparse(18, 96, dtype=values))
    bias = torch.randn(18)
    for rows in (1, 3):
        x = torch.randn(rows, 96).to(x_dtype)
        assert_close(x, tiles, ops.sparse_linear(x, tiles, bias), bias)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("splits", [2, 3, 99])
@pytest.mark.parametrize("dtype", ["int8", "fp32"])
def test_split_inputs_are_added_in_order(dtype: ValueDtype, splits: int, rows: int) -> None:
    tiles = pack_tiles(random_sparse(18, 300, dtype=dtype), TileShape(16, 64))
    x, bias = torch.randn(rows, 300), torch.randn(18)
    y = product(x, tiles, Plan(splits=splits), bias)
    assert_close(x, tiles, y, bias)
    assert runtime.launches()["add_splits_kernel"] == 1
    assert torch.equal(y, product(x, tiles, Plan(splits=splits), bias))


@pytest.mark.parametrize("pattern", ["unstructured", "16:32"])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_many_rows_go_through_a_dense_copy(pattern: str, dtype: ValueDtype) -> None:
    weight = random_sparse(20, 96, pattern=pattern, dtype=dtype)
    tiles = pack_tiles(weight)
    x, bias = torch.randn(70, 96), torch.randn(20)
    assert_close(x, tiles, ops.sparse_linear(x, tiles, bias), bias)
    assert runtime.launches() == {"expand_kernel": 1}
    made = runtime.load("expand", "cpu").expand(tiles, torch.float32)
    assert torch.equal(made, weight.to_dense())


def test_no_rows() -> None:
    assert ops.sparse_linear(torch.zeros(0, 64), pack_tiles(random_sparse(5, 64))).shape == (0, 5)


def test_rows_that_are_not_contiguous() -> None:
    tiles = pack_tiles(random_sparse(5, 64))
    x = torch.randn(64, 3).T
    assert_close(x, tiles, ops.sparse_linear(x, tiles))


def test_what_does_not_fit_is_refused() -> None:
    tiles = pack_tiles(random_sparse(5, 64))
    for x, bias, message in (
        (torch.zeros(2, 63), None, "63 columns, the weight 64 inputs"),
        (torch.zeros(64), None, r"got float32 \[64\]"),
        (torch.zeros(2, 64, dtype=torch.int8), None, "got int8"),
        (torch.zeros(2, 64), torch.zeros(4), r"5 outputs cannot be float32 \[4\]"),
        (torch.zeros(2, 64), torch.zeros(5).half(), "cannot be float16"),
        (torch.zeros(2, 64, device="meta"), None, "is on meta, the weight on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sparse_linear(x, tiles, bias)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_no_load_leaves_its_tensor_and_few_bytes_are_wasted(
    pattern: str, dtype: ValueDtype, rows: int
) -> None:
    sectors = runtime.load("sectors", "cpu")
    tiles = pack_tiles(random_sparse(37, 448, pattern=pattern, dtype=dtype))
    x = torch.ones(rows, 448)
    parts = sectors.weight_tensors(tiles)
    with sectors.recorded({**parts, "x": x}) as seen:
        product(x, tiles, Plan())
    for name, part in {**parts, "x": x}.items():
        size = part.numel() * part.element_size()
        assert seen.num_bytes(name) >= size or name == "starts", name


def test_a_load_beside_a_tensor_is_seen() -> None:
    sectors = runtime.load("sectors", "cpu")
    tiles = pack_tiles(random_sparse(16, 128))
    x = torch.ones(1, 128)
    parts = sectors.weight_tensors(tiles)
    short = {**parts, "values": tiles.values[:-4], "x": x}
    with pytest.raises(Exception, match="4 addresses outside of its tensors"), sectors.recorded(short):
        product(x, tiles, Plan())
