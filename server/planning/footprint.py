"""What one forward of a model reads and computes, from its configuration alone.

Bytes are those of the packed formats (``kernels.formats``), as the engine stores them. Operations count a
multiply-add as two. Knows no device and no time.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from paceline.kernels.formats import LANES, Format, packed_bytes, padded
from paceline.server.models.config import ModelConfig

Weights = Literal["fp32", "bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
#: int4 as GPTQ and AWQ checkpoints have it: a 16-bit scale per group of 128 inputs; head and embedding stay bf16.
INT4_GROUP = 128
_FP32_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True, slots=True)
class Linear:
    """Shape of a linear: ``out`` x ``width`` weights."""

    out: int
    width: int
    bias: bool = False

    @property
    def flops(self) -> int:
        """Operations per row."""
        return 2 * self.out * self.width


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes and operations of one decoder.

    Attributes:
        weights, sparsity: format of the blocks' linears, and the share of their weights that is left out.
        block_bytes, head_bytes: weights that a forward reads in the blocks, and for its logits.
        embedding_bytes: what lies in memory beside those; a forward reads one row of it per token.
        block_flops, head_flops: per row of a forward, and per row whose logits are wanted.
        attention_flops: per row and token that it attends to, all layers together.
        kv_bytes: of K and V (and of the state that is kept for a draft) per token.
        windows: per layer, the most tokens that a row attends to; None is all.
    """

    config: ModelConfig
    weights: Weights
    sparsity: float
    block_bytes: int
    head_bytes: int
    embedding_bytes: int
    block_flops: int
    head_flops: int
    attention_flops: int
    kv_bytes: int
    windows: tuple[int | None, ...]

    @property
    def bytes_per_forward(self) -> int:
        """Weight bytes that a forward with logits reads."""
        return self.block_bytes + self.head_bytes

    @property
    def resident_bytes(self) -> int:
        """Weight bytes in memory."""
        return self.bytes_per_forward + self.embedding_bytes

    @property
    def flops_per_row(self) -> int:
        """Operations of the linears for a row whose logits are wanted."""
        return self.block_flops + self.head_flops

    def attended(self, context: float) -> float:
        """Tokens that a row after ``context`` others attends to, on average over the layers."""
        return sum(context if w is None else min(context, w) for w in self.windows) / len(self.windows)


def block_linears(config: ModelConfig) -> list[Linear]:
    """One block's linears as plans have them: q, k and v joined, gate and up interleaved in tiles."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        Linear(queries + 2 * keys, config.hidden_size, config.qkv_bias),
        Linear(config.hidden_size, queries, config.output_bias),
        Linear(2 * padded(config.intermediate_size, LANES), config.hidden_size, config.mlp_bias),
        Linear(config.hidden_size, config.intermediate_size, config.mlp_bias),
    ]


def footprint(
    config: ModelConfig,
    weights: Weights,
    *,
    sparsity: float = 0.0,
    keeps_states: bool = False,
    shares_head: bool = False,
    shares_embedding: bool = False,
) -> Footprint:
    """Count a decoder.

    Args:
        sparsity: share of the blocks' weights that is left out; an fp32 plan packs them dense all the same.
        keeps_states: the cache keeps every token's state for a draft that reads it.
        shares_head: a tied head is the embedding itself (on GPUs); the CPU kernels pack it once more.
        shares_embedding: a draft that has its target's embedding in memory.
    """
    kept = 1.0 if weights == "fp32" else 1.0 - sparsity
    block, outside = block_linears(config), _outside(config)
    head = Linear(config.head_rows, config.hidden_size)
    element = _FP32_BYTES if weights == "fp32" else _BF16_BYTES
    shared = shares_embedding or (shares_head and config.tied_head and weights != "int8")
    keys = config.num_kv_heads * config.head_dim
    states = config.hidden_size if keeps_states else 0
    return Footprint(
        config=config,
        weights=weights,
        sparsity=1.0 - kept,
        block_bytes=config.num_layers * sum(_bytes(one, weights, kept) for one in block)
        + sum(_bytes(one, weights, 1.0) for one in outside),
        head_bytes=_bytes(head, "bf16" if weights == "int4" else weights, 1.0),
        embedding_bytes=0 if shared else config.vocab_size * config.hidden_size * element,
        block_flops=config.num_layers * sum(one.flops for one in block) + sum(one.flops for one in outside),
        head_flops=head.flops,
        attention_flops=4 * config.num_layers * config.num_heads * config.head_dim,
        kv_bytes=(2 * config.num_layers * keys + states) * element,
        windows=config.sliding_windows,
    )


def _outside(config: ModelConfig) -> list[Linear]:
    """What a draft that reads states has before its blocks."""
    return [Linear(config.hidden_size, 2 * config.hidden_size)] if config.reads_state else []


def _bytes(linear: Linear, weights: Weights, kept: float) -> int:
    if weights != "int4":
        format: Format = weights
        return packed_bytes(linear.out, linear.width, format, bias=linear.bias, kept=kept)
    values = linear.out * linear.width
    masks = 0 if kept == 1.0 else -(-values // 8)
    groups = linear.out * -(-linear.width // INT4_GROUP)
    bias = _FP32_BYTES * linear.out if linear.bias else 0
    return masks + -(-round(kept * values) // 2) + _BF16_BYTES * groups + bias
