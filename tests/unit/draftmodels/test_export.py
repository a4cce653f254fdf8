"""``paceline export``: plain checkpoints that transformers loads, and checked copies."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import TinyCheckpoint
from native_drafts import EMBEDDING, HEAD, write_draft
from native_kernels import pool, require_native, run_alone
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from paceline.draftmodels.cli import export
from paceline.draftmodels.export import export_artifact
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.errors import ArtifactError, ConfigError, ModelNotFoundError
from paceline.server.models.loader import ModelLoader
from paceline.server.models.manifest import read_manifest
from paceline.server.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

CHOSEN = list(range(3, 300, 7))
TOKENS = [5, 80, 299, 0, 41, 17]
BF16 = torch.bfloat16


@pytest.fixture
def draft(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=1)


def native_logits(folder: Path, target: Path) -> torch.Tensor:
    """fp32 arithmetic on the stored values."""
    require_native()
    plan = ModelLoader(torch.device("cpu"), pool("portable")).load(folder, "fp32", target=target).weights
    assert isinstance(plan, DecoderPlan)
    return run_alone(plan, pool("portable"), torch.float32, TOKENS)


def plain_logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize("shared", [(), (HEAD,)])
def test_standalone_gives_the_native_drafts_logits(
    shared: tuple[str, ...], target: Path, draft: Path, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, shared=shared, dtype=BF16)
    report = export_artifact(folder, tmp_path / "out", standalone=True)
    assert report.form == "standalone"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {BF16}
    theirs = load_file(target / "model.safetensors")[HEAD].to(BF16)
    others = [i for i in range(300) if i not in CHOSEN]
    assert torch.equal(stored[HEAD][others], theirs[others])
    logits = plain_logits(tmp_path / "out")[:, CHOSEN]
    # bf16 rounds what the target stores in fp32; all else is the same number, summed in another order.
    tolerance = 2e-2 if shared else 2e-4
    torch.testing.assert_close(logits, native_logits(folder, target), rtol=tolerance, atol=tolerance)
    assert logits.std() > 1


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_tied_heads(arch: Any, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target, draft = tiny_checkpoint(arch), tiny_checkpoint(arch, seed=1)
    restricted = write_draft(tmp_path / "restricted", target, draft, ids=CHOSEN, dtype=BF16)
    export_artifact(restricted, tmp_path / "a", standalone=True)
    head = load_file(tmp_path / "a" / "model.safetensors")[HEAD]
    assert torch.equal(head[0], load_file(target / "model.safetensors")[EMBEDDING][0].to(BF16))
    expected = native_logits(restricted, target)
    torch.testing.assert_close(plain_logits(tmp_path / "a")[:, CHOSEN], expected, rtol=2e-4, atol=2e-4)
    whole = write_draft(tmp_path / "whole", target, draft, dtype=BF16)
    export_artifact(whole, tmp_path / "b", standalone=True)
    assert HEAD not in load_file(tmp_path / "b" / "model.safetensors")
    torch.testing.assert_close(
        plain_logits(tmp_path / "b"), native_logits(whole, target), rtol=2e-4, atol=2e-4
    )


def test_int8_and_shared_tensors_are_filled_in(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = write_draft(tmp_path / "draft", target, draft, shared=[EMBEDDING], int8=True)
    export_artifact(folder, tmp_path / "out", standalone=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(load_file(draft / "model.safetensors"))
    assert torch.equal(stored[EMBEDDING], load_file(target / "model.safetensors")[EMBEDDING].to(BF16))
    name = "model.layers.1.mlp.up_proj.weight"
    original = load_file(folder / "model.safetensors")
    dequantized = original[name].float() * original[f"{name}_scale"][:, None]
    assert torch.equal(stored[name], dequantized.to(BF16))


def test_the_manifest_says_what_it_became(target: Path, draft: Path, tmp_path: Path) -> None:
    measured = ({"dataset": "x", "alpha": 0.5},)
    folder = write_draft(
        tmp_path / "draft", target, draft, ids=CHOSEN, measured=measured, recipe={"a": 1}, extra={"later": 2}
    )
    export_artifact(folder, tmp_path / "out", standalone=True)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.weights, manifest.draft_vocab) == ({"format": "bf16"}, None)
    assert manifest.shared_with_target == ()
    assert manifest.measured == ()
    assert (manifest.recipe, manifest.extra) == ({"a": 1}, {"later": 2})
    assert load_tokenizer(tmp_path / "out").sha256 == load_tokenizer(target).sha256


def test_a_native_export_is_the_same_files(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, shared=[EMBEDDING], int8=True)
    report = export_artifact(folder, tmp_path / "out")
    assert report.form == "native"
    files = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in files)


def test_what_cannot_be_exported_is_refused(
    tiny_checkpoint: TinyCheckpoint, target: Path, draft: Path, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="not an artifact in native form"):
        export_artifact(draft, out, standalone=True)
    with pytest.raises(ConfigError, match="is the artifact itself"):
        export_artifact(folder, folder, force=True)
    with pytest.raises(ArtifactError, match="SHA-256") as caught:
        export_artifact(folder, out, standalone=True, target=str(tiny_checkpoint("llama", seed=8)))
    assert "\n" not in str(caught.value)
    narrow = write_draft(tmp_path / "narrow", target, tiny_checkpoint("llama", hidden_size=48), ids=CHOSEN)
    with pytest.raises(ArtifactError, match=r"come from the target, whose head is \[300, 64\]"):
        export_artifact(narrow, out, standalone=True)
    moved = tmp_path / "moved"
    shutil.copytree(target, moved)
    text = (folder / "paceline.json").read_text()
    (folder / "paceline.json").write_text(text.replace(str(target), str(tmp_path / "lost")))
    with pytest.raises(ModelNotFoundError, match="name it with --target"):
        export_artifact(folder, out, standalone=True)
    assert not out.exists()
    export_artifact(folder, out, standalone=True, target=str(moved))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ArtifactError, match="damaged"):
        export_artifact(folder, tmp_path / "again")


def test_the_command_prints_text_or_json(target: Path, draft: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("export")(export)
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN)

    text = CliRunner().invoke(app, [str(folder), "--standalone", "-o", str(tmp_path / "a")])
    assert text.exit_code == 0, text.output
    assert "standalone form" in text.output

    as_json = CliRunner().invoke(app, [str(folder), "-o", str(tmp_path / "b"), "--json"])
    facts: dict[str, Any] = json.loads(as_json.output)
    assert facts["form"] == "native"
    assert facts["weights_bytes"] == (tmp_path / "b" / "model.safetensors").stat().st_size
