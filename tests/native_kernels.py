"""The native CPU kernels in tests: pools of every instruction set, plans of tiny checkpoints, ragged runs over them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from tiny import Arch
from torch import Tensor

from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import Isa, Pool, library, usable_isas
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.dispatch import native_missing
from paceline.kernels.formats import Format
from paceline.server.models.config import parse_model_config
from paceline.server.models.plan import PlanBuilder

BLOCK_TOKENS = 16
_ONE_KV: Final = {"num_key_value_heads": 1, "head_dim": 32}
_FIVE: Final = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80}
_THREE: Final = {"num_attention_heads": 3, "num_key_value_heads": 3}
_NARROW: Final = {"head_dim": 6, "hidden_size": 72, "intermediate_size": 37, "mlp_bias": True}
_SLIDE: Final = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
#: Shapes that reach the kernels' edges, by name: architecture and overrides of ``tiny.tiny_hf_config``.
TINY_SHAPES: Final[Mapping[str, tuple[Arch, dict[str, Any]]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, **_ONE_KV}),
    "odd-heads": ("qwen3", {"num_attention_heads": 3, "intermediate_size": 100, **_ONE_KV}),
    "head-80": ("llama", {"head_dim": 80, **_FIVE}),
    "head-128": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "head-100": ("mistral", {"head_dim": 100, **_THREE}),
    "head-6": ("llama", _NARROW),
    "some-layers-slide": ("qwen3", {"intermediate_size": 100, **_SLIDE}),
    "window-of-one": ("mistral", {"sliding_window": 1}),
}


def require_native(isa: Isa | None = None) -> None:
    """Skip what needs the library (in CI: fail) or an instruction set that this CPU does not have."""
    missing = native_missing()
    if missing is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    if isa is not None and isa not in usable_isas():
        pytest.skip(f"this CPU does not run {isa}")


@cache
def pool(isa: Isa, threads: int = 2) -> Pool:
    """One per instruction set and size, kept: its threads sleep between calls."""
    return Pool(threads, isa)


def load_plan(folder: Path, format: Format) -> DecoderPlan:
    """The plan of a tiny checkpoint."""
    config = parse_model_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tensors = load_file(folder / "model.safetensors")
    return PlanBuilder(config, lambda name: tensors[name].float(), pool("portable"), format).build()


@dataclass(eq=False)
class Running:
    """A sequence: its tokens, its blocks, and how many tokens have been run."""

    tokens: list[int]
    table: list[int]
    done: int = 0


def executor(
    plan: DecoderPlan, pool: Pool, kv_dtype: torch.dtype, *, num_blocks: int, fill: int = 0
) -> Executor:
    """An executor over KV memory of its own whose every byte is ``fill``; 255 makes NaN of both types."""
    layers = 2 * len(plan.layers)
    block_bytes = layers * BLOCK_TOKENS * plan.kv_heads * plan.head_dim * kv_dtype.itemsize
    kv = torch.full((num_blocks, block_bytes), fill, dtype=torch.uint8)
    return Executor(plan, pool, kv, kv_dtype=kv_dtype, block_tokens=BLOCK_TOKENS)


def run_alone(
    plan: DecoderPlan, pool: Pool, kv_dtype: torch.dtype, tokens: Sequence[int], *, chunk: int = 1
) -> Tensor:
    """Logits of every position, fp32 [tokens, vocab]; blocks in order, ``chunk`` tokens a call."""
    table = list(range(-(-len(tokens) // BLOCK_TOKENS)))
    ex = executor(plan, pool, kv_dtype, num_blocks=len(table))
    parts = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        parts.append(ex.forward(part, [(0, len(part), start, table)], range(len(part))))
    return torch.cat(parts)


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets how many models each native forward has from now on."""
    calls: list[int] = []
    real = library()

    class Library:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def pl_forward(self, models: int, batches: int, count: int, handle: int, isa: int) -> Any:
            calls.append(count)
            return real.pl_forward(models, batches, count, handle, isa)

    monkeypatch.setattr("paceline.kernels.cpu.executor.library", Library)
    return calls
