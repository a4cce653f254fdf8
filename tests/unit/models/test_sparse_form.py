"""Sparse artifacts: loaded as what was written, by both executors, and refused in one line if anything contradicts."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import HEAD
from native_kernels import TINY_SHAPES, pool, require_native, run_alone
from safetensors.torch import load_file, save_file
from sparse_students import is_pruned, prune, write_dense_twin, write_tiny_student
from torch import Tensor

from paceline.draftmodels.artifact import write_student
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import PackedLinear, Pattern, SparseWeight
from paceline.server.errors import ArtifactError, UserError
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


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        own = load_file(folder / "model.safetensors")
        change(own)
        save_file(own, folder / "model.safetensors")

    return apply


def replaced(part: str, value: Callable[[Tensor], Tensor], name: str = DOWN) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        own[name + part] = value(own[name + part]).contiguous()

    return tensors(change)


def removed(part: str) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        del own[DOWN + part]

    return tensors(change)


def added(name: str, value: Tensor) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        own[name] = value

    return tensors(change)


def weights(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change_json(folder / "paceline.json", weights=fields)
        change_json(folder / "config.json", quantization_config={"quant_method": "paceline", **fields})

    return apply


def flipped(mask: Tensor) -> Tensor:
    mask[3, 2] ^= 16
    return mask


def shifted(offsets: Tensor) -> Tensor:
    offsets[5] += 1
    return offsets


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit more or less": (replaced("_bitmask", flipped), r"bits set, but there are \d+ values"),
    "values cut off": (replaced("_values", lambda v: v[:-1]), r"bits set, but there are \d+ values"),
    "offsets that lie": (replaced("_row_offsets", shifted), "row offsets do not count"),
    "offsets cut off": (replaced("_row_offsets", lambda o: o[:-1]), r"row offsets must be int64 \[65\]"),
    "offsets of another type": (
        replaced("_row_offsets", lambda o: o.int()),
        r"row offsets must be int64 \[65\]",
    ),
    "a mask of another type": (replaced("_bitmask", lambda m: m.char()), "bitmask must be uint8"),
    "a mask of another width": (
        replaced("_bitmask", lambda m: m[:, :-1]),
        r"bitmask must be uint8 \[out, 12\]",
    ),
    "a mask of other rows": (
        replaced("_bitmask", lambda m: m[:-1]),
        r"scales must be fp32 \[63\], but are float32 \[64\]",
    ),
    "scales cut off": (replaced("_scale", lambda s: s[:-1]), r"scales must be fp32 \[64\]"),
    "scales of another type": (replaced("_scale", lambda s: s.half()), r"scales must be fp32 \[64\]"),
    "values of another type": (replaced("_values", lambda v: v.half()), "int8 values need one scale"),
    "a value of -128": (replaced("_values", lambda v: v.fill_(-128)), "there is a -128"),
    "no mask": (removed("_bitmask"), f"tensor {DOWN}_bitmask is missing"),
    "no values": (removed("_values"), f"tensor {DOWN}_values is missing"),
    "no offsets": (removed("_row_offsets"), f"tensor {DOWN}_row_offsets is missing"),
    "no scales": (removed("_scale"), f"tensor {DOWN}_scale is missing"),
    "dense and sparse": (added(DOWN, torch.zeros(64, 96)), f"{DOWN} is stored dense and sparse at once"),
    "a sparse head": (
        added(f"{HEAD}_bitmask", torch.zeros(300, 8)),
        f"{HEAD} is sparse, but only the projections",
    ),
    "another type in the manifest": (
        weights(format="bitmask", value_dtype="fp32"),
        "says unstructured fp32|_scale is",
    ),
    "another pattern in the manifest": (
        weights(format="n:m", value_dtype="int8", n=2, m=4),
        f"{DOWN}_row_offsets is not of a 2:4 int8|_row_offsets is not of a 2:4",
    ),
    "n:m without n": (weights(format="n:m", value_dtype="int8", m=4), "needs whole numbers n and m"),
    "n above m": (weights(format="n:m", value_dtype="int8", n=5, m=4), "needs 0 < n < m, not 5:4"),
    "a bitmask with n": (
        weights(format="bitmask", value_dtype="int8", n=2, m=4),
        "format bitmask has no n and m",
    ),
    "no type of values": (weights(format="bitmask"), "value_dtype must be one of fp32"),
    "a dense format": (weights(format="int8"), "says weights.format int8, but .* is sparse|quantization"),
    "config.json says otherwise": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config must be .*paceline.* but is .*gptq",
    ),
    "config.json says nothing": (
        lambda folder: change_json(folder / "config.json", quantization_config=None),
        "quantization_config must be .* but is None",
    ),
    "another model's configuration": (
        lambda folder: change_json(folder / "config.json", intermediate_size=104),
        "bitmask must be uint8|but the configuration says",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused_in_one_line(case: str, target: Path, tmp_path: Path):
    change, says = BROKEN[case]
    folder = write_tiny_student(tmp_path / "s", target, dtype="int8")
    change(folder)
    for load in (native, decoder):
        with pytest.raises(UserError, match=says) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def test_a_group_with_another_count_is_refused(target: Path, tmp_path: Path):
    folder = write_tiny_student(tmp_path / "s", target, dtype="int8", pattern="16:32")
    replaced("_bitmask", flipped)(folder)
    with pytest.raises(ArtifactError, match=f"{DOWN}: a 16:32 weight needs 16 bits in every group of 32"):
        native(folder)


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
