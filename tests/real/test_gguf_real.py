"""Real GGUF files: every tensor and configuration value as transformers' own loader reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_models import QWEN_CODER, SMOLLM2
from transformers import AutoModelForCausalLM, GgufConfig

from paceline.draftmodels.cut import cut_draft
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config
from paceline.server.models.manifest import read_manifest
from paceline.server.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.real


def test_smollm2_equals_the_loader_of_transformers(real_model: Callable[[str], Path]) -> None:
    path = real_model(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        # Newer versions keep the weights packed unless told otherwise.
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = open_checkpoint(path)

    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}  # tied
    assert ours.tensor_names() == sorted(state)
    for name, tensor in state.items():
        torch.testing.assert_close(ours.tensor(name), tensor, rtol=0, atol=0, msg=name)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert ours.hf_config[key] == getattr(theirs.config, key)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "eos_token_id", "bos_token_id"):
        assert ours.hf_config[key] == getattr(theirs.config, key)
    assert ours.hf_config["rms_norm_eps"] == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    assert ours.hf_config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    assert ours.hf_config["tie_word_embeddings"] == theirs.config.tie_word_embeddings is True


def test_qwen_keeps_its_own_head(real_model: Callable[[str], Path]) -> None:
    path = real_model(QWEN_CODER)
    ours = open_checkpoint(path)

    config = parse_model_config(ours.hf_config)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (24, 896, 4864)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
    assert (config.vocab_size, config.context_length, config.tied_head) == (151936, 32768, False)
    head, embedding = ours.tensor("lm_head.weight"), ours.tensor("model.embed_tokens.weight")
    assert head.shape == embedding.shape == (151936, 896)
    # Two quantizations of what was one matrix.
    assert not torch.equal(head, embedding)
    assert torch.nn.functional.cosine_similarity(head[:1000], embedding[:1000]).min() > 0.99
    assert ours.tensor("model.layers.0.self_attn.q_proj.bias").shape == (896,)


def test_a_draft_cut_from_smollm2_loads_in_transformers(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    layers = [0, 1, 28, 29]
    report = cut_draft(SMOLLM2, layers, tmp_path / "draft")
    target = open_checkpoint(real_model(SMOLLM2))

    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.bfloat16)
    for new, old in enumerate(layers):
        for name, tensor in draft.model.layers[new].state_dict().items():
            expected = target.tensor(f"model.layers.{old}.{name}").to(torch.bfloat16)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert report.parameters == sum(parameter.numel() for parameter in draft.parameters())
    tokenizer = load_tokenizer(tmp_path / "draft")
    manifest = read_manifest(tmp_path / "draft")
    assert manifest is not None
    assert manifest.base.tokenizer_sha256 == tokenizer.sha256 == load_tokenizer(real_model(SMOLLM2)).sha256
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert draft.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
