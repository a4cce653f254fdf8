"""``paceline export --standalone`` of a draft that reads states: what vLLM's ``eagle`` method loads.

The checkpoint is read back as vLLM's ``llama_eagle.py`` reads it: into Llama blocks by name, without norms before the
first and behind the last, under the target's head.
"""

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from feature_oracle import FeatureOracle
from native_drafts import EMBEDDING, HEAD, write_feature_draft, write_near_feature_draft
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, LlamaModel

from paceline.draftmodels.export import export_artifact
from paceline.server.errors import ArtifactError, UnsupportedModelError
from paceline.server.models.checkpoint import open_checkpoint, read_json
from paceline.server.models.config import parse_model_config
from paceline.server.models.eagle_start import corrected_fc
from paceline.server.models.manifest import read_manifest
from paceline.server.models.native_form import NativeCheckpoint

CHOSEN = list(range(3, 300, 7))
TOKENS = [5, 80, 299, 0, 41, 17]
BF16 = torch.bfloat16


def eagle_logits(folder: Path, head: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    config = read_json(folder / "config.json")
    qkv_bias = config.get("qkv_bias", False)
    model = (
        LlamaModel._from_config(AutoConfig.for_model(**config), attn_implementation="eager").float().eval()
    )
    if qkv_bias:  # vLLM's Llama blocks have the switch, those of transformers have one for all four
        for layer in model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias = nn.Parameter(
                    torch.empty(getattr(layer.self_attn, name).out_features)
                )
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    fc = tensors.pop("fc.weight")
    loaded = model.load_state_dict(tensors, strict=False)
    assert loaded.missing_keys == ["layers.0.input_layernorm.weight", "norm.weight"]
    assert not loaded.unexpected_keys
    model.layers[0].input_layernorm = model.norm = nn.Identity()
    x = F.linear(torch.cat((model.embed_tokens(torch.tensor(TOKENS)), features), dim=1), fc)
    with torch.no_grad():
        states = model(inputs_embeds=x[None]).last_hidden_state[0]
    return F.linear(states, head)


@pytest.mark.parametrize("ids", [None, CHOSEN])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_exported_draft_gives_the_native_drafts_logits(
    arch, ids: list[int] | None, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
):
    target = tiny_checkpoint(arch)
    folder = write_feature_draft(tmp_path / "draft", target, layers=2, ids=ids, dtype=BF16)
    report = export_artifact(folder, tmp_path / "out", standalone=True)
    assert report.form == "standalone"
    config, manifest = read_json(tmp_path / "out" / "config.json"), read_manifest(tmp_path / "out")
    assert (config["architectures"], config["model_type"]) == (["EagleLlamaForCausalLM"], "llama")
    assert manifest is not None
    assert (manifest.draft_vocab, manifest.shared_with_target) == (None, ())
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {BF16}

    theirs = load_file(target / "model.safetensors")
    head = theirs[EMBEDDING if arch == "qwen2" else HEAD]
    features = torch.randn(len(TOKENS), 64, generator=torch.Generator().manual_seed(1))
    oracle = FeatureOracle(folder, target)
    fc = corrected_fc(NativeCheckpoint(folder, open_checkpoint(target)), open_checkpoint(target))
    oracle.replace_fc(fc.to(BF16).float())
    expected, _ = oracle.rows(TOKENS, features)
    got = eagle_logits(tmp_path / "out", head, features)
    # The embedding alone is rounded: it is the target's, in fp32.
    torch.testing.assert_close(got if ids is None else got[:, ids], expected, rtol=0.02, atol=0.02)
    assert expected.std() > 0.3


def test_what_vllm_could_not_run_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path):
    target = tiny_checkpoint("llama")
    own_head = write_near_feature_draft(tmp_path / "own", target)
    with pytest.raises(ArtifactError, match="has a head of its own") as caught:
        export_artifact(own_head, tmp_path / "out", standalone=True)
    assert "\n" not in str(caught.value)
    other = write_feature_draft(tmp_path / "qwen3", tiny_checkpoint("qwen3"))
    with pytest.raises(ArtifactError, match="llama and qwen2 without sliding windows, and its type is qwen3"):
        export_artifact(other, tmp_path / "out", standalone=True)
    assert not (tmp_path / "out").exists()
    export_artifact(write_feature_draft(tmp_path / "draft", target), tmp_path / "out", standalone=True)
    with pytest.raises(UnsupportedModelError, match="serve the artifact that it was exported from"):
        parse_model_config(read_json(tmp_path / "out" / "config.json"))
