"""Shape and arithmetic of one decoder of the Llama family, read from a Hugging Face ``config.json``.

``ModelConfig`` is everything the decoder needs and nothing else; transformers normalises the many spellings of the
fields (rope parameters, layer types), this module refuses what the native engine does not compute.
"""

from collections.abc import Mapping, Sized
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from paceline.server.errors import ArtifactError, PacelineError, UnsupportedModelError

#: model_type in config.json -> what users call it.
SUPPORTED = {"llama": "Llama 1-3", "mistral": "Mistral", "qwen2": "Qwen2 / Qwen2.5", "qwen3": "Qwen3"}
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIRST_NORM, FINAL_NORM = "model.layers.0.input_layernorm.weight", "model.norm.weight"
#: The linear that joins embedding and state in a draft that reads its target's states, and the key that says so.
FC, READS_STATE = "model.fc.weight", "reads_target_state"
#: Sizes in config.json and the most that the engine counts to, far above any model.
_SIZES = {
    "num_hidden_layers": 10_000,
    "head_dim": 1 << 16,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 30,
    "max_position_embeddings": (1 << 31) - 1,
}
#: ``architectures`` of artifacts in native form (``native_form``), so that other loaders refuse them.
NATIVE_ARCHITECTURE = "PacelineForCausalLM"
#: That of a draft that reads states in the form that vLLM's ``eagle`` method loads.
EAGLE_ARCHITECTURE = "EagleLlamaForCausalLM"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder.

    Attributes:
        rope_inv_freq: head_dim / 2 rotation speeds, radians per position, scaling applied.
        rope_attention_scale: factor on cos and sin (yarn); 1.0 otherwise.
        sliding_windows: per layer, how many latest positions (own included) a query sees; None sees all.
        head_rows: logits of the head: ``vocab_size``, or as many ids as a draft of a restricted vocabulary proposes.
        reads_state: a feature-reading draft (EAGLE, arXiv:2401.15077): block 0 gets fc([embedding(x_i), h_(i-1)]) with
            h the target's state after its final norm, later draft steps the draft's own state instead. No norm before
            the first block's attention, none after the last block.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_attention_scale: float
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    head_rows: int
    reads_state: bool = False

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a checkpoint tensor by its Hugging Face name."""
        part, kind = name.split(".")[-2:]
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        outputs = {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            "embed_tokens": (self.vocab_size, self.hidden_size),
            "lm_head": (self.head_rows, self.hidden_size),
            "fc": (self.hidden_size, 2 * self.hidden_size),
        }
        if part in outputs:
            return outputs[part] if kind == "weight" else outputs[part][:1]
        return (self.head_dim,) if part in ("q_norm", "k_norm") else (self.hidden_size,)

    def tensor_names(self) -> list[str]:
        """Every checkpoint tensor that the decoder is made of."""
        block = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        parts = {"self_attn.o_proj": self.output_bias}
        parts |= {f"self_attn.{p}_proj": self.qkv_bias for p in "qkv"}
        parts |= {f"mlp.{p}_proj": self.mlp_bias for p in ("gate", "up", "down")}
        block += [f"{part}.weight" for part in parts] + [
            f"{part}.bias" for part, bias in parts.items() if bias
        ]
        block += [f"self_attn.{p}_norm.weight" for p in "qk" if self.qk_norm]
        outside = [EMBEDDING, FC if self.reads_state else FINAL_NORM, *([] if self.tied_head else [HEAD])]
        names = outside + [f"model.layers.{i}.{name}" for i in range(self.num_layers) for name in block]
        return [name for name in names if not (self.reads_state and name == FIRST_NORM)]


def restricted(config: ModelConfig, ids: Sized | None) -> ModelConfig:
    """The configuration with a head for ``ids`` only; such a head is a matrix of its own, also where it was tied."""
    return config if ids is None else replace(config, head_rows=len(ids), tied_head=False)


def unsupported(what: str) -> UnsupportedModelError:
    """The one refusal sentence for models that the native engine does not run."""
    return UnsupportedModelError(
        f"{what} is not supported by the native engine, which runs {', '.join(SUPPORTED.values())}; "
        "try --engine vllm"
    )


def parse_model_config(hf: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Read a decoder's configuration.

    Args:
        hf: the content of ``config.json``.
        where: what to call it in error messages.

    Raises:
        UnsupportedModelError: another architecture, rope scaling or activation.
        ArtifactError: fields that are missing or contradict each other.
    """
    named = architectures(hf, where)
    if NATIVE_ARCHITECTURE in named:
        raise UnsupportedModelError(
            f"{where} is in Paceline's native form, which only the server loads; "
            "paceline export DIR --standalone -o OUT makes a plain checkpoint of it"
        )
    if EAGLE_ARCHITECTURE in named:
        raise UnsupportedModelError(
            f"{where} is a draft in the form for vLLM's eagle method; serve the artifact that it was exported from"
        )
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in SUPPORTED:
        raise unsupported(f"model type {model_type!r} ({where})")
    if hf.get("hidden_act", "silu") != "silu":
        raise unsupported(f"activation {hf['hidden_act']!r} ({where})")
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise unsupported(f"quantization {method!r} ({where})")
    _check_sizes(hf, where)
    reads_state = _reads_state(hf, where)
    from transformers import AutoConfig

    try:
        normal = AutoConfig.for_model(**deepcopy(dict(hf)))  # it writes into nested tables
        return replace(_from_transformers(normal, where), reads_state=reads_state)
    except PacelineError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for fields that make no sense
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{where} is not a valid {model_type} configuration: {reason}") from error


def architectures(hf: Mapping[str, Any], where: str) -> list[Any]:
    """What ``config.json`` names under ``architectures``.

    Raises:
        ArtifactError: that is no list.
    """
    named = hf.get("architectures") or []
    if not isinstance(named, list):
        raise ArtifactError(f"{where}: architectures must be a list of names, but is {named!r}")
    return named


def _check_sizes(hf: Mapping[str, Any], where: str) -> None:
    """Sizes that nothing could be made of, or that would fill the memory before any tensor is looked at."""
    for key, most in _SIZES.items():
        value = hf.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ArtifactError(f"{where}: {key} must be a whole number from 1 to {most}, but is {value!r}")


def _reads_state(hf: Mapping[str, Any], where: str) -> bool:
    value = hf.get(READS_STATE, False)
    if not isinstance(value, bool):
        raise ArtifactError(f"{where}: {READS_STATE} must be true or false, not {value!r}")
    return value


def _from_transformers(c: Any, where: str) -> ModelConfig:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    inv_freq, scale = _rope(c, head_dim, where)
    _check_shapes(c, head_dim, where)
    return ModelConfig(
        model_type=c.model_type,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        context_length=c.max_position_embeddings,
        rms_eps=c.rms_norm_eps,
        rope_inv_freq=inv_freq,
        rope_attention_scale=scale,
        tied_head=bool(c.tie_word_embeddings),
        qkv_bias=c.model_type == "qwen2" or bool(getattr(c, "attention_bias", False)),
        output_bias=c.model_type in ("llama", "qwen3") and bool(getattr(c, "attention_bias", False)),
        mlp_bias=c.model_type == "llama" and bool(getattr(c, "mlp_bias", False)),
        qk_norm=c.model_type == "qwen3",
        sliding_windows=_windows(c),
        head_rows=c.vocab_size,
    )


def _check_shapes(c: Any, head_dim: int, where: str) -> None:
    if c.num_attention_heads % c.num_key_value_heads:
        raise ArtifactError(
            f"{where}: num_attention_heads ({c.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({c.num_key_value_heads})"
        )
    if head_dim % 2:
        raise ArtifactError(f"{where}: head_dim ({head_dim}) must be even for rotary embeddings")


def _windows(c: Any) -> tuple[int | None, ...]:
    window: int | None = getattr(c, "sliding_window", None)
    layers: int = c.num_hidden_layers
    if c.model_type == "llama" or window is None:
        return (None,) * layers
    if c.model_type == "mistral":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in c.layer_types)


def _rope(c: Any, head_dim: int, where: str) -> tuple[tuple[float, ...], float]:
    """Rotation speeds and the cos/sin factor, as transformers computes them for this configuration."""
    parameters = c.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE:
        raise unsupported(f"rope scaling {kind!r} ({where}; known: {', '.join(SUPPORTED_ROPE)})")
    import torch

    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"))
    return tuple(inv_freq.tolist()), float(scale)
