"""GGUF metadata read as a Hugging Face ``config.json``.

Owns which GGUF architectures are known and how their keys translate, rope scaling included. Knows no tensor
data, except the rope factors of Llama 3 files, which are configuration that GGUF keeps in a tensor.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from paceline.server.errors import ArtifactError
from paceline.server.models.config import unsupported

#: general.architecture -> class in config.json. Mistral models travel as ``llama``, which computes the same.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class Metadata:
    """Typed look-ups in a GGUF header; architecture-specific keys go without their prefix."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self.path = path
        self._fields = reader.fields
        architecture = self.general("general.architecture")
        if architecture not in ARCHITECTURES:
            raise unsupported(f"GGUF architecture {architecture!r} ({path.name})")
        if (self.general("split.count") or 1) > 1:
            raise ArtifactError(
                f"{path} is one part of a split GGUF file: join the parts (llama-gguf-split --merge)"
            )
        self.architecture: str = architecture

    def general(self, key: str) -> Any:
        """Value of a full key, None if absent; single-precision numbers in their shortest spelling."""
        field = self._fields.get(key)
        if field is None:
            return None
        value = field.contents()
        # 1e-5 is stored as single precision; read as double it would be 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def length(self, key: str) -> int:
        """Number of entries of an array, 0 if it is absent; entries themselves are not read."""
        field = self._fields.get(key)
        # A field's parts: key length, key, type, then the array's item type, its length, its items.
        return 0 if field is None else int(field.parts[4][0])

    def get(self, key: str) -> Any:
        """Value of ``ARCHITECTURE.key``, None if absent."""
        return self.general(f"{self.architecture}.{key}")

    def need(self, key: str) -> Any:
        """Value of ``ARCHITECTURE.key``.

        Raises:
            ArtifactError: it is missing.
        """
        value = self.get(key)
        if value is None:
            raise ArtifactError(f"{self.path} lacks the metadata {self.architecture}.{key}")
        return value


def hf_config(metadata: Metadata, tensors: Collection[str], vocab_size: int) -> dict[str, Any]:
    """The ``config.json`` of the model in a GGUF file.

    Args:
        metadata: its header.
        tensors: Hugging Face names of its tensors.
        vocab_size: rows of its embedding.
    """
    heads = _per_model(metadata, "attention.head_count")
    head_dim = metadata.get("attention.key_length") or metadata.get("rope.dimension_count")
    config = {
        "architectures": [ARCHITECTURES[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": vocab_size,
        "hidden_size": metadata.need("embedding_length"),
        "intermediate_size": _per_model(metadata, "feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _per_model(metadata, "attention.head_count_kv", default=heads),
        "head_dim": head_dim or metadata.need("embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base") or 10000.0,
        "rope_scaling": _rope_scaling(metadata),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float32",
    }
    return config | _biases(metadata, tensors) | _sliding_window(metadata) | special_ids(metadata)


def rope_from_frequencies(factors: npt.NDArray[Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Recover Llama 3 rope scaling from the per-frequency divisors that GGUF stores instead.

    Args:
        factors: [head_dim / 2], what each rotation speed is divided by.
        config: a ``config.json`` with rope_theta, head_dim and max_position_embeddings.
        path: for the error message.

    Raises:
        UnsupportedModelError: the factors follow no Llama 3 rule.
    """
    base, head_dim, factor = config["rope_theta"], config["head_dim"], round(float(factors.max()), 4)
    context = config["max_position_embeddings"]
    for original in sorted({8192, context, int(context / factor)}):
        if np.allclose(_llama3_factors(base, head_dim, factor, original), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise unsupported(f"the rope scaling in rope_freqs.weight ({path.name})")


#: Every published Llama 3 model uses these two, and GGUF files do not state them.
_LOW, _HIGH = 1.0, 4.0


def _llama3_factors(base: float, head_dim: int, factor: float, original: int) -> npt.NDArray[np.float64]:
    """Divisors of the rotation speeds under Llama 3 scaling: 1 for short waves, ``factor`` for long ones."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise unsupported(f"rope scaling {kind!r} ({metadata.path.name})")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.need("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.need("rope.scaling.original_context_length")
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if metadata.get(f"rope.scaling.{theirs}") is not None:
                scaling[ours] = metadata.get(f"rope.scaling.{theirs}")
        if (attention := metadata.get("rope.scaling.attn_factor")) is not None:
            # Theirs multiplies yarn's own factor, Hugging Face's replaces it.
            scaling["attention_factor"] = attention * (1.0 + 0.1 * math.log(scaling["factor"]))
    return scaling


def _per_model(metadata: Metadata, key: str, default: int | None = None) -> int:
    """A number that GGUF may also state per layer; layers that differ are not supported."""
    value = metadata.get(key) if default is not None else metadata.need(key)
    values = value if isinstance(value, list) else [default if value is None else value]
    if len(set(values)) != 1:
        raise unsupported(f"{key} that differs between layers ({metadata.path.name})")
    return int(str(values[0]))


def _biases(metadata: Metadata, tensors: Collection[str]) -> dict[str, Any]:
    if metadata.architecture == "qwen2":  # always has q/k/v biases, and no key for it
        return {}
    biased = {name.split(".", 3)[-1] for name in tensors if name.endswith(".bias")}
    return {
        "attention_bias": "self_attn.q_proj.bias" in biased,
        **({"mlp_bias": "mlp.up_proj.bias" in biased} if metadata.architecture == "llama" else {}),
    }


def _sliding_window(metadata: Metadata) -> dict[str, Any]:
    window = metadata.get("attention.sliding_window")
    if not window:
        return {}
    if metadata.architecture == "llama":
        return {"sliding_window": window, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    raise unsupported(f"a sliding window in a {metadata.architecture} GGUF file ({metadata.path.name})")


def special_ids(metadata: Metadata) -> dict[str, Any]:
    """bos, eos (one id, or a list) and pad ids, None where the file names none."""

    def id_of(key: str) -> Any:
        return metadata.general(f"tokenizer.ggml.{key}_token_id")

    eos = sorted({id_of(key) for key in ("eos", "eot")} - {None})
    return {
        "bos_token_id": id_of("bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": id_of("padding"),
    }
