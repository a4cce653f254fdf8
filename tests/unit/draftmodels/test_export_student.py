"""``paceline export`` of sparse students: plain checkpoints that transformers loads, and checked copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import HEAD
from safetensors.torch import load_file, save_file
from sparse_students import prune, write_tiny_student
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.draftmodels.artifact import int8_linears
from paceline.draftmodels.export import export_artifact
from paceline.server.errors import ArtifactError
from paceline.server.models.loader import ModelLoader
from paceline.server.models.manifest import read_manifest
from paceline.server.models.native_form import NativeCheckpoint, is_native_form

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = [5, 80, 299, 0, 41, 17]
DOWN = "model.layers.0.mlp.down_proj.weight"


def logits(folder: Path) -> Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        found: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return found


def rounded(folder: Path, parent: Path, pattern: str, dtype: Any, *, int8_head: bool) -> Path:
    """The pruned weights as a plain checkpoint, rounded to bf16, written without any of the code under test."""
    dense, sparse = prune(parent, pattern, dtype)
    if int8_head:
        values, scale = int8_linears({HEAD: dense[HEAD]}).values()
        dense[HEAD] = values.float() * scale[:, None]
    every = dense | {name: weight.to_dense() for name, weight in sparse.items()}
    folder.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in every.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((parent / "config.json").read_text())
    return folder


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_standalone_is_what_the_same_weights_compute(
    arch: Any, dtype: Any, pattern: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """A tied head stays tied, an int8 one comes dequantized."""
    parent = tiny_checkpoint(arch)
    int8_head = dtype == "int8" and arch == "llama"
    student = write_tiny_student(tmp_path / "s", parent, dtype=dtype, pattern=pattern, int8_head=int8_head)
    report = export_artifact(student, tmp_path / "out", standalone=True)
    assert (report.form, report.base) == ("standalone", str(parent))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored[DOWN], prune(parent, pattern, dtype)[1][DOWN].to_dense().bfloat16())
    assert (HEAD in stored) == (arch == "llama")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = logits(rounded(tmp_path / "plain", parent, pattern, dtype, int8_head=int8_head))
    # The same numbers, the same sums.
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1


def test_a_standalone_student_is_a_plain_checkpoint(target: Path, tmp_path: Path) -> None:
    student = write_tiny_student(tmp_path / "s", target, measured=({"kl_nats": 0.1, "dataset": "text"},))
    export_artifact(student, tmp_path / "out", standalone=True)
    assert not is_native_form(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.kind, dict(manifest.weights), manifest.measured) == ("student", {"format": "bf16"}, ())
    ModelLoader(torch.device("cpu")).load(tmp_path / "out", "fp32")


def test_a_copy_stays_sparse(target: Path, tmp_path: Path) -> None:
    student = write_tiny_student(tmp_path / "s", target, dtype="int8")
    export_artifact(student, tmp_path / "copy")
    copied, original = (
        NativeCheckpoint(tmp_path / "copy").sparse(DOWN),
        NativeCheckpoint(student).sparse(DOWN),
    )
    assert copied is not None
    assert original is not None
    assert torch.equal(copied.stored(), original.stored())
    (student / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        export_artifact(student, tmp_path / "again")
    assert not (tmp_path / "again").exists()
