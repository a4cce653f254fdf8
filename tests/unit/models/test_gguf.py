"""GGUF files written from tiny Hugging Face checkpoints must read back as those checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from paceline.server.errors import ArtifactError, UnsupportedModelError
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config
from paceline.server.models.gguf import hf_name
from paceline.server.models.gguf_config import _llama3_factors

TinyCheckpoint = Callable[..., Path]

_LEAVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    leaf, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LEAVES[leaf]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp keeps them: row 2 i of a head is the original's i, row 2 i + 1 its i + half."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + i + half * odd for head in range(heads) for i in range(half) for odd in (0, 1)]
    return weight[rows]


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    architecture: str | None = None,
    quantize: gguf.GGMLQuantizationType | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    arch = architecture or {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    extra(writer)
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = next((value for leaf, value in heads.items() if leaf in name), None)
        stored = interleaved(tensor, config[key]) if key and arch == "llama" else tensor
        data = stored.float().numpy()
        if quantize is not None and data.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(data, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint_of(
    tiny_checkpoint: TinyCheckpoint, arch: tiny.Arch, **overrides: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = tiny_checkpoint(arch, **overrides)
    return tiny.tiny_hf_config(arch, **overrides), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_tensor_and_the_configuration_come_back(
    arch: tiny.Arch, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    config, tensors = checkpoint_of(tiny_checkpoint, arch)
    window = config.get("sliding_window")
    path = write_gguf(
        tmp_path / "m.gguf", config, tensors, extra=lambda w: w.add_sliding_window(window) if window else None
    )

    opened = open_checkpoint(path)

    assert opened.tensor_names() == sorted(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(opened.tensor(name), tensor, rtol=0, atol=0)
    assert parse_model_config(opened.hf_config) == parse_model_config(config)
    assert opened.hf_config["rms_norm_eps"] == 1e-5  # not 9.99999974e-06
    assert (opened.hf_config["bos_token_id"], opened.hf_config["eos_token_id"]) == (0, 3)


def test_llama_biases_are_unpermuted_too(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    config, tensors = checkpoint_of(tiny_checkpoint, "llama", attention_bias=True)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))

    name = "model.layers.1.self_attn.k_proj.bias"
    torch.testing.assert_close(opened.tensor(name), tensors[name], rtol=0, atol=0)
    assert opened.hf_config["attention_bias"] is True


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_quantized_rows_are_unpermuted_like_plain_ones(
    kind: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    config, tensors = checkpoint_of(tiny_checkpoint, "llama")
    quantization = gguf.GGMLQuantizationType[kind]
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, quantize=quantization))

    for leaf in ("q_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{leaf}.weight"
        rounded = gguf.dequantize(gguf.quantize(tensors[name].numpy(), quantization), quantization)
        got = opened.tensor(name)
        assert got.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
        np.testing.assert_array_equal(got.float().numpy(), rounded)


def test_half_precision_is_kept_as_stored(tmp_path: Path) -> None:
    writer_path = tmp_path / "m.gguf"
    config = tiny.tiny_hf_config("llama", num_hidden_layers=0)
    embedding = np.arange(300 * 64, dtype=np.float16).reshape(300, 64)
    write_gguf(writer_path, config, {}, extra=lambda w: w.add_tensor("token_embd.weight", embedding))

    got = open_checkpoint(writer_path).tensor("model.embed_tokens.weight")

    assert got.dtype == torch.float16
    np.testing.assert_array_equal(got.numpy(), embedding)


def embedding_only(path: Path, extra: Callable[[gguf.GGUFWriter], None], **overrides: Any) -> Path:
    config = tiny.tiny_hf_config("llama", **overrides)
    tensors = {"model.embed_tokens.weight": torch.zeros(300, 64)}
    return write_gguf(path, config, tensors, extra=extra)


def test_linear_and_yarn_rope_scaling(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(256)

    scaling = open_checkpoint(embedding_only(tmp_path / "l.gguf", linear)).hf_config["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}

    scaling = open_checkpoint(embedding_only(tmp_path / "y.gguf", yarn)).hf_config["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


def test_llama3_rope_factors_become_configuration(tmp_path: Path) -> None:
    published = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny.tiny_hf_config("llama", head_dim=64, rope_theta=500000.0, max_position_embeddings=131072)
    plain = np.array(parse_model_config(config).rope_inv_freq)
    scaled = np.array(parse_model_config({**config, "rope_scaling": dict(published)}).rope_inv_freq)
    factors = (plain / scaled).astype(np.float32)  # the oracle: transformers' own rule
    assert factors.max() > 2 > factors.min()

    path = embedding_only(
        tmp_path / "m.gguf",
        lambda writer: writer.add_tensor("rope_freqs.weight", factors),
        head_dim=64,
        rope_theta=500000.0,
        max_position_embeddings=131072,
    )

    assert open_checkpoint(path).hf_config["rope_scaling"] == published


def test_rope_factors_of_no_known_rule_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    assert not np.allclose(factors, _llama3_factors(10000.0, 16, 8.0, 8192))
    path = embedding_only(tmp_path / "m.gguf", lambda w: w.add_tensor("rope_freqs.weight", factors))

    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_checkpoint(path)


def test_several_ends_of_sequence(tmp_path: Path) -> None:
    path = embedding_only(tmp_path / "m.gguf", lambda writer: writer.add_eot_token_id(9))
    assert open_checkpoint(path).hf_config["eos_token_id"] == [3, 9]


def test_other_architectures_and_tensors_are_refused(tmp_path: Path) -> None:
    config = tiny.tiny_hf_config("llama")
    gemma = write_gguf(tmp_path / "g.gguf", config, {}, architecture="gemma2")
    with pytest.raises(UnsupportedModelError, match=r"gemma2.*Qwen3.*--engine vllm"):
        open_checkpoint(gemma)

    experts = np.zeros((2, 4, 4), dtype=np.float32)
    mixtral = embedding_only(
        tmp_path / "e.gguf", lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", experts)
    )
    with pytest.raises(UnsupportedModelError, match="ffn_gate_exps"):
        open_checkpoint(mixtral)


def test_split_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = embedding_only(tmp_path / "s.gguf", lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ArtifactError, match="join the parts"):
        open_checkpoint(path)


def test_cut_and_damaged_files_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    config, tensors = checkpoint_of(tiny_checkpoint, "qwen2")
    whole = write_gguf(tmp_path / "m.gguf", config, tensors).read_bytes()
    cut = tmp_path / "cut.gguf"

    # Every length in the header, then some in the data.
    for length in [0, 3, 5, 20, *range(24, 1500, 37), len(whole) // 2, len(whole) - 100]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ArtifactError) as caught:
            open_checkpoint(cut)
        assert "\n" not in str(caught.value)

    cut.write_bytes(b"not a gguf file at all, but long enough to hold a header")
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        open_checkpoint(cut)


def test_arrays_in_the_header_are_skipped_to_the_byte(tmp_path: Path) -> None:
    def arrays(writer: gguf.GGUFWriter) -> None:
        writer.add_array("test.strings", ["", "é", "a longer one"])
        writer.add_array("test.numbers", [1.5, 2.5])
        writer.add_array("test.flags", [True, False, True])
        writer.add_string("test.after", "found")

    from paceline.server.models.gguf import open_reader

    path = embedding_only(tmp_path / "m.gguf", arrays)
    ours, theirs = open_reader(path), gguf.GGUFReader(path)

    assert ours.fields["test.after"].contents() == "found"
    assert ours.fields["test.numbers"].contents() == [1.5, 2.5]
    assert ours.fields["test.flags"].contents() == [True, False, True]
    assert ours.data_offset == theirs.data_offset
    assert ours.fields["test.strings"].data == []  # not read: that is the point of it


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    opened = open_checkpoint(embedding_only(tmp_path / "m.gguf", lambda _: None))
    with pytest.raises(ArtifactError, match=r"no tensor model\.norm\.weight"):
        opened.tensor("model.norm.weight")
    assert hf_name("blk.x.attn_q.weight") is None
    assert hf_name("blk.0.attn_q.scale") is None
