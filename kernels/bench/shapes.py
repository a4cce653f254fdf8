"""Decoders of random weights in the shapes of real ones, for benches: speed depends on shapes alone.

Owns the shapes and the plans. One layer is packed and then copied into memory of its own for each layer of the
decoder, so building takes seconds while a forward reads as many different bytes as with the real weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.memory import compact
from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.formats import Format, interleave_rows

BLOCK_TOKENS = 16
KV_DTYPE = torch.bfloat16
#: Rows of random numbers that embedding and head are made of, again and again.
_RANDOM_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts of one decoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qkv_bias: bool = False


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49_152),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151_936, qkv_bias=True),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151_936, qkv_bias=True),
}


def _matrix(rows: int, columns: int) -> Tensor:
    """Random fp32 [rows, columns] that keeps the size of what it multiplies."""
    pattern = torch.randn(min(rows, _RANDOM_ROWS), columns) / math.sqrt(columns)
    return pattern.repeat(-(-rows // len(pattern)), 1)[:rows]


def random_plan(shape: Shape, format: Format, pool: Pool, seed: int = 0) -> DecoderPlan:
    """A decoder of the given shape, its weights in one buffer as the engine lays them out."""
    torch.manual_seed(seed)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    bias = torch.randn(queries + 2 * keys) if shape.qkv_bias else None
    gate_up = interleave_rows(_matrix(shape.ffn, shape.hidden), _matrix(shape.ffn, shape.hidden))
    layer = LayerPlan(
        attention_norm=torch.ones(shape.hidden),
        mlp_norm=torch.ones(shape.hidden),
        qkv=pool.pack(_matrix(queries + 2 * keys, shape.hidden), format, bias),
        output=pool.pack(_matrix(shape.hidden, queries), format),
        gate_up=pool.pack(gate_up, format),
        down=pool.pack(_matrix(shape.hidden, shape.ffn), format),
    )
    table = _matrix(shape.vocab, shape.hidden)
    plan = DecoderPlan(
        hidden=shape.hidden,
        ffn=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
        eps=1e-6,
        rope_scale=1.0,
        inv_freq=1e6 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim),
        embedding=table if format == "fp32" else table.bfloat16(),
        final_norm=torch.ones(shape.hidden),
        head=pool.pack(table, format),
        layers=(layer,) * shape.layers,
    )
    return compact(plan)


def executor(plan: DecoderPlan, pool: Pool, blocks: int) -> Executor:
    """An executor over ``blocks`` empty ``KV_DTYPE`` blocks of ``BLOCK_TOKENS`` tokens."""
    size = 2 * len(plan.layers) * BLOCK_TOKENS * plan.kv_heads * plan.head_dim * KV_DTYPE.itemsize
    kv = torch.zeros(blocks, size, dtype=torch.uint8)
    return Executor(plan, pool, kv, kv_dtype=KV_DTYPE, block_tokens=BLOCK_TOKENS)
