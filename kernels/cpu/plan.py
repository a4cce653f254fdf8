"""A whole decoder as the CPU executor runs it: packed layers and shapes, built once at load."""

from dataclasses import dataclass

from torch import Tensor

from paceline.kernels.formats import PackedLinear


@dataclass(frozen=True)
class LayerPlan:
    """One block. Norm weights are fp32, ``attention_norm`` None where there is none; ``gate_up`` has its rows
    interleaved (``formats.interleave_rows``)."""

    attention_norm: Tensor | None
    mlp_norm: Tensor
    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder of the Llama family.

    Attributes:
        vocab: token ids that it reads, the rows of ``embedding``.
        inv_freq: fp32 [head_dim / 2].
        embedding: fp32 or bf16 [vocab, hidden].
        head: one output per logit; ``vocab`` of them unless ``vocab_ids`` says otherwise.
        final_norm: fp32 [hidden]; None where there is none.
        vocab_ids: of a restricted vocabulary, the token id of each logit, ascending, int32 [head outputs].
        fc: of a draft that reads states, [2 * hidden] -> [hidden]: its blocks get fc([embedding, feature]).
    """

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    rope_scale: float
    inv_freq: Tensor
    embedding: Tensor
    final_norm: Tensor | None
    head: PackedLinear
    layers: tuple[LayerPlan, ...]
    vocab_ids: Tensor | None = None
    fc: PackedLinear | None = None

    @property
    def linears(self) -> list[PackedLinear]:
        """In the order in which a forward reads them: fc, every layer's linears, the head."""
        first = [] if self.fc is None else [self.fc]
        blocks = [p for layer in self.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return [*first, *blocks, self.head]

    @property
    def bytes_per_forward(self) -> int:
        """Weight bytes that a forward with logits reads."""
        return sum(linear.num_bytes for linear in self.linears)
