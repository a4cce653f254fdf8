"""Tiny random checkpoints in Hugging Face form, so that unit tests need no network and no real model.

Owns: config dicts for the four decoder families, weights scaled so that outputs are peaked and depend on
every part of the model, and a byte-level tokenizer with a ChatML template. All of it is written by
`transformers` and `tokenizers` themselves; nothing of Paceline is imported: an independent oracle.

Ids: 0 ``<s>``, 1 ``</s>``, 2 ``<|im_start|>``, 3 ``<|im_end|>`` (end of sequence), 4.. single bytes (letters
first), then merged letter pairs up to 300. Weights are fp32. A checkpoint is a few hundred kB.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Arch = Literal["llama", "mistral", "qwen2", "qwen3"]
ARCHS: Final[tuple[Arch, ...]] = ("llama", "mistral", "qwen2", "qwen3")

SPECIALS: Final = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
EOS_ID: Final = 3

#: Merged into one token each, as real vocabularies do; with 256 bytes and 4 specials they make 300 ids.
_PAIRS: Final = re.findall(
    "..", "thheineranreonatenndtiesorteofedisitalarsttontngsehaasouiolevecomedehiriroicneea"
)

CHAT_TEMPLATE: Final = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CLASSES: Final[dict[Arch, str]] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_ARCH_KEYS: Final[dict[Arch, dict[str, Any]]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None},
    "qwen3": {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None},
}


def tiny_hf_config(arch: Arch = "llama", **overrides: Any) -> dict[str, Any]:
    """A `config.json` as hubs hold it: 2 layers, hidden 64, 4 heads over 2 KV heads, 300 ids, 512 positions.

    ``mistral`` has a sliding window of 16 tokens, ``qwen2`` q/k/v biases and ``qwen3`` q/k norms; the Qwens
    tie their head to the embedding. Any key can be overridden.
    """
    return {
        "architectures": [_CLASSES[arch]],
        "model_type": arch,
        "vocab_size": len(SPECIALS) + 256 + len(_PAIRS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
        "pad_token_id": 1,
        "dtype": "float32",
        **_ARCH_KEYS[arch],
        **overrides,
    }


def write_tiny_checkpoint(
    folder: Path, arch: Arch = "llama", seed: int = 0, *, perturb: float = 0.0, **overrides: Any
) -> Path:
    """Write a random model with its tokenizer and return ``folder``.

    Args:
        folder: created if missing.
        seed: same seed, same weights.
        perturb: noise added to every weight, relative to that weight tensor's standard deviation. With the
            target's seed and, say, 0.1 it makes a draft that agrees with the target often, but not always.
        overrides: keys of the config, see `tiny_hf_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_hf_config(arch, **overrides)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
    )
    _fill(model, seed, perturb)
    model.save_pretrained(folder)
    # Our dict, not transformers' rewrite of it: hubs hold `rope_theta` and `rope_scaling` at the top level.
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tiny_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` ids with a ChatML template.

    Below 300 ids the merged pairs go first, then the rarer bytes; text outside the vocabulary then vanishes.
    Above 300 the rest is filled up with ``<|extra_i|>``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (not char.isalpha(), char))
    words = [*SPECIALS, *alphabet, *_PAIRS][:vocab_size]
    words += [f"<|extra_{i}|>" for i in range(vocab_size - len(words))]
    known = set(words)
    merges = [(pair[0], pair[1]) for pair in _PAIRS if pair in known]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _fill(model: torch.nn.Module, seed: int, perturb: float) -> None:
    """Random weights under which attention, MLP, norms and biases all change the output.

    The initialisers of `transformers` (std 0.02) would leave a 64-wide model nearly blind to its layers and
    its logits nearly flat. Here the logits' standard deviation is near 2.5, the best token's p 0.1 to 0.9.
    """
    values = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1_000_003)
    with torch.no_grad():
        for name, weight in _by_name(model):
            mean, std = _moments(name, weight)
            weight.copy_(mean + std * torch.randn(weight.shape, generator=values))
            weight.add_(perturb * std * torch.randn(weight.shape, generator=noise))


def _by_name(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters in name order, tied ones once: the weights then don't hang on a library's module order."""
    yield from sorted(model.named_parameters(), key=lambda item: item[0])


def _moments(name: str, weight: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation for one tensor."""
    if name.endswith(".bias"):
        return 0.0, 0.5
    if "norm" in name:
        return 1.0, 0.2
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 0.3
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain / float(weight.shape[-1]) ** 0.5
