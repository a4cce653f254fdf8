"""Sparse artifacts: loaded as what was written, by both executors, and refused in one line if anything contradicts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_kernels import TINY_SHAPES, pool, require_native, run_alone
from sparse_students import is_pruned, prune, write_dense_twin, write_tiny_student
from torch import Tensor

from paceline.draftmodels.artifact import write_student
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import PackedLinear, Pattern, SparseWeight
from paceline.server.errors import ArtifactError
from paceline.server.models import plan as plan_module
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import ModelLoader
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.packer import Packer

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
TOKENS = [5, 80, 299, 0, 41, 17]
DOWN = "model.layers.0.mlp.down_proj.weight"
PATTERNS = ("unstructured", "2:4", "16:32")
Tensors = dict[str, Tensor]


def native(path: Path, weights: Any = "fp32") -> DecoderPlan:
    require_native()
    model = ModelLoader(CPU, pool("portable")).load(path, weights)
    assert isinstance(model.weights, DecoderPlan)
    return model.weights


def decoder(path: Path, weights: Any = "fp32") -> Decoder:
    model = ModelLoader(CPU).load(path, weights)
    assert isinstance(model.weights, Decoder)
    return model.weights


def logits(plan: DecoderPlan) -> Tensor:
    return run_alone(plan, pool("portable"), torch.float32, TOKENS)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is kept of every linear that is packed sparse."""
    shares: list[float] = []

    def recording(values: Tensor, kept: Tensor, *rest: Any) -> PackedLinear:
        assert kept.dtype is torch.bool
        assert kept.shape == values.shape
        assert not values[~kept].any()
        shares.append(float(kept.float().mean()))
        return pack_sparse(values, kept, *rest)

    monkeypatch.setattr(plan_module, "pack_sparse", recording)
    return shares


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_everything_comes_back(pattern: str, dtype: Any, target: Path, tmp_path: Path):
    written = NativeCheckpoint(write_tiny_student(tmp_path / "s", target, pattern=pattern, dtype=dtype))
    dense, sparse = prune(target, pattern, dtype)
    assert written.tensor_names() == sorted([*dense, *sparse])
    for name, expected in sparse.items():
        read = written.sparse(name)
        assert read is not None
        assert (read.pattern, read.value_dtype) == (expected.pattern, dtype)
        assert torch.equal(read.stored(), expected.stored())
        assert torch.equal(read.kept(), expected.kept())
        assert torch.equal(written.tensor(name).float(), expected.to_dense())
    assert all(written.sparse(name) is None for name in dense)
    assert written.manifest.kind == "student"
    assert "quantization_config" not in written.hf_config
    said = json.loads((written.path / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "paceline", **written.manifest.weights}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        ("fp32", "fp32"),
        ("fp32", "bf16"),
        ("fp32", "int8"),
        ("fp16", "bf16"),
        ("bf16", "bf16"),
        ("int8", "int8"),
    ],
)
def test_the_native_plan_computes_what_dense_weights_do(
    pattern: str, dtype: Any, weights: Any, target: Path, tmp_path: Path, packed: list[float]
):
    plan = native(write_tiny_student(tmp_path / "s", target, pattern=pattern, dtype=dtype), weights)
    assert len(packed) == (0 if weights == "fp32" else 8), (
        "q, k, v and gate, up are joined; the head is dense"
    )
    assert all(0.4 < share < 0.6 for share in packed)
    twin = native(write_dense_twin(tmp_path / "d", target, pattern=pattern, dtype=dtype), weights)
    for ours, theirs in zip(plan.linears, twin.linears, strict=True):
        assert (ours.format, ours.out_features, ours.in_features) == (
            theirs.format,
            theirs.out_features,
            theirs.in_features,
        )
        assert torch.equal(ours.unpack(), theirs.unpack())
    assert torch.equal(logits(plan), logits(twin))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_torch_modules_compute_what_dense_weights_do(
    pattern: str, dtype: Any, target: Path, tmp_path: Path
):
    model = decoder(write_tiny_student(tmp_path / "s", target, pattern=pattern, dtype=dtype))
    twin = decoder(write_dense_twin(tmp_path / "d", target, pattern=pattern, dtype=dtype))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(model.blocks, twin.blocks, strict=True):
        ours: Any = a
        theirs: Any = b
        for one, other in (
            (ours.attention.qkv, theirs.attention.qkv),
            (ours.attention.out, theirs.attention.out),
        ):
            assert type(one).__name__ == "SparseLinear"
            torch.testing.assert_close(one(x), other(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.mlp(x), theirs.mlp(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("int8_head", [False, True])
def test_heads(tied: bool, int8_head: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path):
    """Tied, of floats, or int8 as stored; biases and norms beside them."""
    if tied and int8_head:
        pytest.skip("a tied head has no tensor")
    parent = tiny_checkpoint("qwen2", tie_word_embeddings=tied)
    folder = write_tiny_student(tmp_path / "s", parent, dtype="int8", int8_head=int8_head)
    plan = native(folder, "auto")
    twin = native(write_dense_twin(tmp_path / "d", parent, dtype="int8"), "auto")
    assert plan.head.format == "int8"
    assert torch.equal(logits(plan), logits(twin))


@pytest.mark.parametrize("weights", ["auto", "bf16", "fp32"])
def test_int8_values_run_as_they_are_stored(
    weights: Any, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    plan = native(write_tiny_student(tmp_path / "s", target, dtype="int8"), weights)
    assert "is stored in int8" in caplog.text
    assert {linear.format for linear in plan.linears} == {"int8"}
    stored = prune(target, dtype="int8")[1]
    assert torch.equal(plan.layers[0].down.unpack(), stored[DOWN].to_dense())


def test_auto_measures_float_values_and_keeps_them_sparse(target: Path, tmp_path: Path, packed: list[float]):
    plan = native(write_tiny_student(tmp_path / "s", target, dtype="bf16"), "auto")
    assert packed
    assert {linear.format for linear in plan.linears} <= {"int8", "bf16"}


def test_a_packed_file_brings_back_sparse_linears(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_tiny_student(tmp_path / "s", target, dtype="int8")
    first = native(folder, "int8")
    monkeypatch.setattr(Packer, "_pack", None)
    again = native(folder, "int8")
    for a, b in zip(first.linears, again.linears, strict=True):
        assert a.num_bytes == b.num_bytes
        assert torch.equal(a.unpack(), b.unpack())
    assert torch.equal(logits(first), logits(again))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_linear_may_stay_dense(dtype: Any, weights: Any, target: Path, tmp_path: Path):
    """One of those that are joined, and one that stands alone."""
    dense, sparse = prune(target, dtype=dtype)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        dense[name] = sparse.pop(name).to_dense()
    reference = write_tiny_student(tmp_path / "all", target, dtype=dtype)
    original = NativeCheckpoint(reference)
    config = json.loads((target / "config.json").read_text())
    write_student(
        tmp_path / "some",
        config=config,
        tensors=dense,
        sparse=sparse,
        manifest=original.manifest,
        tokenizer_from=target,
    )
    ours, theirs = native(tmp_path / "some", weights), native(reference, weights)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)
    model = decoder(tmp_path / "some")
    block: Any = model.blocks[0]
    assert block.attention.qkv(torch.ones(1, 64)).shape == (1, 128)


def test_joined_rows_are_the_rows_of_the_parts():
    torch.manual_seed(0)
    dense = [torch.randn(n, 20) * (torch.rand(n, 20) < 0.5) for n in (3, 1, 5)]
    joined = SparseWeight.stack([SparseWeight.from_dense(weight) for weight in dense])
    assert torch.equal(joined.to_dense(), torch.cat(dense))
    pattern = Pattern.parse("2:4")
    with pytest.raises(ValueError, match="cannot be joined"):
        SparseWeight.stack([joined, SparseWeight.from_dense(torch.zeros(2, 20), pattern=pattern)])


def test_what_contradicts_itself_is_not_written(target: Path, tmp_path: Path):
    config = json.loads((target / "config.json").read_text())
    dense, sparse = prune(target)
    manifest = NativeCheckpoint(write_tiny_student(tmp_path / "s", target)).manifest

    def write(dense: Tensors, sparse: dict[str, SparseWeight]) -> None:
        write_student(
            tmp_path / "new",
            config=config,
            tensors=dense,
            sparse=sparse,
            manifest=manifest,
            tokenizer_from=target,
        )

    other = prune(target, dtype="bf16")[1]
    cases: list[tuple[Tensors, dict[str, SparseWeight], str]] = [
        (dense, {}, "needs sparse weights"),
        (dense, sparse | {DOWN: other[DOWN]}, "one pattern and one value type"),
        (dense | {DOWN: sparse[DOWN].to_dense()}, sparse, f"{DOWN} is among the dense tensors and among"),
        (dense, {name: w for name, w in sparse.items() if name != DOWN}, f"new: tensor {DOWN} is missing"),
        (
            dense,
            {**sparse, "model.layers.9.mlp.up_proj.weight": sparse[DOWN]},
            "layers.9.* is not of this model",
        ),
    ]
    for tensors, weights, says in cases:
        with pytest.raises(ArtifactError, match=says):
            write(tensors, weights)
        assert not (tmp_path / "new").exists()
    assert all(is_pruned(name) for name in sparse)


@pytest.mark.parametrize("shape", ["odd-heads", "head-6", "biases"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_shapes_that_fill_no_tiles(shape: str, dtype: Any, tiny_checkpoint: TinyCheckpoint, tmp_path: Path):
    """Rows that are not whole tiles, inputs that are not whole bytes of a mask, biases, q and k norms."""
    arch, overrides = TINY_SHAPES[shape]
    parent = tiny_checkpoint(arch, **overrides)
    weights = "int8" if dtype == "int8" else "bf16"
    student = write_tiny_student(tmp_path / "s", parent, dtype=dtype)
    twin = write_dense_twin(tmp_path / "d", parent, dtype=dtype)
    ours, theirs = native(student, weights), native(twin, weights)
    for a, b in zip(ours.linears, theirs.linears, strict=True):
        assert torch.equal(a.unpack(), b.unpack())
    assert torch.equal(logits(ours), logits(theirs))
    x = torch.ones(2, ours.hidden)
    mlps: list[Any] = [decoder(folder).blocks[1] for folder in (student, twin)]
    torch.testing.assert_close(mlps[0].mlp(x), mlps[1].mlp(x), rtol=1e-5, atol=1e-5)
