"""Drafts in native form: what is loaded is what was written, and what does not fit is refused in one line."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import EMBEDDING, HEAD, IDS, Tensors, write_draft
from native_kernels import load_plan, pool, require_native, run_alone
from safetensors.torch import load_file, save_file

from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.errors import ArtifactError, UnsupportedModelError, UserError
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader
from paceline.server.models.native_form import NativeCheckpoint, is_native_form, open_model
from paceline.server.models.packer import Packer

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
CHOSEN = list(range(3, 300, 7))
TOKENS = [5, 80, 299, 0, 41, 17]


@pytest.fixture
def draft(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", perturb=0.05)


def native(path: Path, weights: Any = "fp32", target: Path | None = None) -> DecoderPlan:
    require_native()
    model = ModelLoader(CPU, pool("portable")).load(path, weights, target=target)
    assert isinstance(model.weights, DecoderPlan)
    return model.weights


def decoder(path: Path, target: Path | None = None) -> Decoder:
    model = ModelLoader(CPU).load(path, "fp32", target=target)
    assert isinstance(model.weights, Decoder)
    return model.weights


def logits(plan: DecoderPlan) -> torch.Tensor:
    return run_alone(plan, pool("portable"), torch.float32, TOKENS)


def same_linears(a: DecoderPlan, b: DecoderPlan) -> bool:
    return all(torch.equal(x.unpack(), y.unpack()) for x, y in zip(a.linears, b.linears, strict=True))


def test_an_unrestricted_draft_is_the_checkpoint_it_was_made_of(target: Path, draft: Path, tmp_path: Path):
    folder = write_draft(tmp_path / "draft", target, draft)
    assert is_native_form(folder)
    assert not is_native_form(draft)
    assert torch.equal(logits(native(folder)), logits(load_plan(draft, "fp32")))
    assert decoder(folder).vocab_ids is None
    assert native(folder).vocab_ids is None


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_a_restricted_head_gives_the_logits_of_its_ids(
    format: Any, target: Path, draft: Path, tmp_path: Path
):
    plan = native(write_draft(tmp_path / "draft", target, draft, ids=CHOSEN), format)
    assert plan.vocab == 300
    assert plan.vocab_ids is not None
    assert plan.vocab_ids.tolist() == CHOSEN
    assert torch.equal(logits(plan), logits(load_plan(draft, format))[:, CHOSEN])


def test_the_torch_modules_get_the_same_tensors(target: Path, draft: Path, tmp_path: Path):
    shared = [EMBEDDING, HEAD]
    model = decoder(write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, shared=shared), target)
    theirs, ours = load_file(target / "model.safetensors"), load_file(draft / "model.safetensors")
    assert torch.equal(model.head.weight, theirs[HEAD][CHOSEN])
    assert torch.equal(model.embedding, theirs[EMBEDDING])
    norm: Any = model.norm
    assert torch.equal(norm.weight, ours["model.norm.weight"])
    assert model.vocab_ids is not None
    assert model.vocab_ids.tolist() == CHOSEN


@pytest.mark.parametrize("ids", [None, CHOSEN])
@pytest.mark.parametrize("tied_target", [False, True])
def test_shared_tensors_are_the_targets(
    ids: list[int] | None, tied_target: bool, tiny_checkpoint: TinyCheckpoint, draft: Path, tmp_path: Path
):
    target = tiny_checkpoint("llama", seed=4, tie_word_embeddings=tied_target)
    shared = [HEAD, "model.norm.weight"]
    folder = write_draft(tmp_path / "draft", target, draft, ids=ids, shared=shared)
    assert not set(shared) & set(load_file(folder / "model.safetensors"))
    plan, theirs = native(folder, target=target), load_plan(target, "fp32")
    expected = theirs.head.unpack()
    assert torch.equal(plan.head.unpack(), expected if ids is None else expected[ids])
    assert plan.final_norm is not None
    assert theirs.final_norm is not None
    assert torch.equal(plan.final_norm, theirs.final_norm)
    assert torch.equal(plan.embedding, load_plan(draft, "fp32").embedding)


@pytest.mark.parametrize("shared", [(), (EMBEDDING,)])
@pytest.mark.parametrize("int8", [False, True])
def test_a_tied_head_is_the_embeddings_rows(
    int8: bool, shared: tuple[str, ...], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
):
    target = tiny_checkpoint("qwen2")
    folder = write_draft(
        tmp_path / "draft", target, tiny_checkpoint("qwen2", seed=1), ids=CHOSEN, shared=shared, int8=int8
    )
    plan = native(folder, target=target)
    assert plan.head.format == ("int8" if int8 else "fp32")
    rows = load_plan(target if shared else tiny_checkpoint("qwen2", seed=1), plan.head.format).head.unpack()
    assert torch.equal(plan.head.unpack(), rows[CHOSEN])


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("weights", ["auto", "bf16", "int8"])
def test_int8_is_run_as_it_is_stored(
    arch: Any, weights: Any, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    target, draft = tiny_checkpoint(arch), tiny_checkpoint(arch, seed=1, attention_bias=True, mlp_bias=True)

    def halve(tensors: Tensors) -> None:
        """Values that a second rounding would change."""
        for name, tensor in tensors.items():
            if tensor.dtype is torch.int8:
                tensors[name] = tensor // 2

    folder = write_draft(tmp_path / "draft", target, draft, int8=True, edit=halve)
    stored = load_file(folder / "model.safetensors")
    plan = native(folder, weights)
    assert ("is stored in int8" in caplog.text) == (weights != "int8")
    name = "model.layers.1.mlp.down_proj.weight"
    assert {linear.format for linear in plan.linears} == {"int8"}
    expected = stored[name].float() * stored[f"{name}_scale"][:, None]
    assert torch.equal(plan.layers[1].down.unpack(), expected)
    again = native(folder, weights)  # from the packed cache
    assert same_linears(again, plan)
    blocks: Any = decoder(folder).blocks
    assert torch.equal(blocks[1].mlp.down.weight, expected)
    assert torch.equal(plan.layers[0].qkv.unpack(), blocks[0].attention.qkv.weight)


def test_int8_in_an_artifact_equals_int8_at_load(target: Path, draft: Path, tmp_path: Path):
    stored = native(write_draft(tmp_path / "a", target, draft, int8=True), "int8")
    rounded = native(draft, "int8")
    assert same_linears(stored, rounded)


def test_auto_measures_no_restricted_vocabulary(
    target: Path, draft: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    plan = native(write_draft(tmp_path / "draft", target, draft, ids=CHOSEN), "auto")
    assert {linear.format for linear in plan.linears} == {"int8"}
    assert "has a restricted vocabulary" in caplog.text


def test_a_packed_file_is_not_taken_for_another_vocabulary_or_target(
    tiny_checkpoint: TinyCheckpoint, draft: Path, tmp_path: Path
):
    keys = set()
    for number, seed in enumerate((0, 0, 9)):
        target = tiny_checkpoint("llama", seed=seed)
        ids = CHOSEN if number else CHOSEN[1:]
        folder = write_draft(tmp_path / str(number), target, draft, ids=ids, shared=[HEAD])
        plan = native(folder, "int8", target)
        expected = load_plan(target, "int8").head.unpack()[ids]
        assert torch.equal(plan.head.unpack(), expected)
        keys.add(open_model(folder, open_checkpoint(target)).weights_sha256())
    assert len(keys) == 3


def test_a_plain_draft_of_two_targets_is_loaded_once(tiny_checkpoint: TinyCheckpoint, draft: Path):
    require_native()
    loader = ModelLoader(CPU, pool("portable"))
    models: list[LoadedModel] = [
        loader.load(draft, "fp32", target=tiny_checkpoint("llama", seed=seed)) for seed in (0, 1)
    ]
    assert models[0] is models[1]


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return lambda folder: change_tensors(folder, change)


def removed(name: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return lambda folder: change_tensors(folder, change)


def manifest(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "paceline.json", **fields)


DOWN = "model.layers.0.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "unsorted ids": (replaced(IDS, lambda ids: ids.flip(0)), "must hold ascending ids"),
    "an id twice": (replaced(IDS, lambda ids: ids.clamp(max=200)), "must hold ascending ids"),
    "an id too high": (replaced(IDS, lambda ids: ids + 6), "holds ids from 9 to 303, .* 0 to 299"),
    "an id too low": (replaced(IDS, lambda ids: ids - 4), "holds ids from -1"),
    "ids of another type": (
        replaced(IDS, lambda ids: ids.long()),
        r"must be int32 \[k\], but is int64 \[43\]",
    ),
    "no ids": (replaced(IDS, lambda ids: ids[:0]), r"must be int32 \[k\]"),
    "ids that are not there": (removed(IDS), "no tensor draft_vocab_ids"),
    "wrong head rows": (
        replaced(HEAD, lambda w: w[1:]),
        "lm_head.weight has 42 rows, but draft_vocab_ids lists 43",
    ),
    "a missing scale": (removed(f"{DOWN}_scale"), f"{DOWN} is int8 .* has no"),
    "scales of another length": (
        replaced(f"{DOWN}_scale", lambda s: s[1:]),
        f"{DOWN} and its scales must be",
    ),
    "scales of another type": (replaced(f"{DOWN}_scale", lambda s: s.half()), "float16"),
    "a value of -128": (replaced(DOWN, lambda w: w.fill_(-128)), "holds -128"),
    "a missing tensor": (removed("model.norm.weight"), "model.norm.weight is missing"),
    "a shared tensor that is stored": (
        manifest(shared_with_target=["model.norm.weight"]),
        "model.norm.weight is stored, but",
    ),
    "a shared tensor that the target lacks": (
        manifest(shared_with_target=["model.layers.7.mlp.up_proj.weight"]),
        "shares model.layers.7.mlp.up_proj.weight .* has none",
    ),
    "another format": (
        manifest(weights={"format": "bf16"}),
        "weights.format bf16, but there are int8 weights",
    ),
    "an unknown format": (
        manifest(weights={"format": "int4"}),
        "holds int4 weights; this version loads fp32",
    ),
    "no manifest": (lambda folder: (folder / "paceline.json").unlink(), "has no paceline.json"),
    "no base architecture": (
        lambda folder: change_json(folder / "config.json", base_architecture=None),
        "base_architecture must name",
    ),
    "a tied head beside a head": (
        lambda folder: change_json(folder / "config.json", tie_word_embeddings=True),
        "says tie_word_embeddings; set that to false",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused_in_one_line(case: str, target: Path, draft: Path, tmp_path: Path):
    change, says = BROKEN[case]
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, int8=True)
    change(folder)
    for load in (native, decoder):
        with pytest.raises(UserError, match=says) as caught:
            load(folder, target=target)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def test_another_targets_tensors_are_refused_with_both_hashes(
    tiny_checkpoint: TinyCheckpoint, target: Path, draft: Path, tmp_path: Path
):
    other = tiny_checkpoint("llama", seed=9)
    folder = write_draft(tmp_path / "draft", target, draft, shared=[EMBEDDING])
    with pytest.raises(ArtifactError) as caught:
        decoder(folder, other)
    for path in (target, other):
        assert open_checkpoint(path).weights_sha256() in str(caught.value)
    with pytest.raises(ArtifactError, match=r"takes model.embed_tokens.weight from .*--draft"):
        decoder(folder)
    unshared = write_draft(tmp_path / "unshared", target, draft)
    decoder(unshared, other)  # its own tensors do for any target of the tokenizer


def test_another_width_needs_an_embedding_of_its_own(
    tiny_checkpoint: TinyCheckpoint, target: Path, tmp_path: Path
):
    narrow = tiny_checkpoint("llama", hidden_size=48)
    plan = native(write_draft(tmp_path / "own", target, narrow, ids=CHOSEN), target=target)
    assert torch.equal(logits(plan), logits(load_plan(narrow, "fp32"))[:, CHOSEN])
    folder = write_draft(tmp_path / "shared", target, narrow, ids=CHOSEN, shared=[EMBEDDING])
    with pytest.raises(ArtifactError, match=r"hidden_size 48 and the target 64: .* of its own"):
        native(folder, target=target)


def test_what_reads_plain_checkpoints_refuses_the_native_form(target: Path, draft: Path, tmp_path: Path):
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["PacelineForCausalLM"]
    assert config["base_architecture"] == "LlamaForCausalLM"
    with pytest.raises(UnsupportedModelError, match="native form"):
        parse_model_config(config)


def test_the_packer_keeps_the_ids(target: Path, draft: Path, tmp_path: Path):
    """They are in the cache file too: a warm start does not ask the artifact."""
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN)
    native(folder, "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packer, "_pack", None)
        plan = native(folder, "int8")
    assert plan.vocab_ids is not None
    assert plan.vocab_ids.tolist() == CHOSEN
    assert NativeCheckpoint(folder).hf_config["architectures"] == ["LlamaForCausalLM"]
