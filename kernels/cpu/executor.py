"""The CPU executor: a plan of a whole decoder built once, then one native call per ragged forward.

``DecoderPlan`` describes the decoder with packed layers and shapes; ``Executor`` turns it into C structs that point
into the plan's tensors (kept alive here) and runs batches. Knows nothing of requests, schedulers or checkpoints.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.cpu.library import (
    F32,
    I32,
    I64,
    PTR,
    LinearStruct,
    Pool,
    check,
    library,
    linear_struct,
    pointer,
)
from paceline.kernels.formats import LANES, PackedLinear

KV_CODES = {torch.float32: 0, torch.bfloat16: 1}


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


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, PTR) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, LinearStruct) for name in ("qkv", "output", "gate_up", "down")),
        ("window", I32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")),
        *((name, I32) for name in ("embedding_format", "kv_format", "block_tokens")),
        *((name, F32) for name in ("eps", "rope_scale")),
        *((name, PTR) for name in ("inv_freq", "embedding", "final_norm", "layers")),
        ("head", LinearStruct),
        *((name, PTR) for name in ("vocab_ids", "kv")),
        ("block_bytes", I64),
        ("state_offset", I64),
        ("fc", LinearStruct),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("rows", "sequences", "wanted")),
        *((name, PTR) for name in ("tokens", "first_row", "count", "start", "table_start", "tables")),
        *((name, PTR) for name in ("wanted_rows", "logits", "features", "states")),
    )


class _Draft(ctypes.Structure):
    _fields_ = (
        ("drafts", I32),
        *((name, PTR) for name in ("sequence", "length", "tokens")),
        ("stride", I32),
    )


#: One sequence of a batch: (first row, rows, position of the first row, block numbers).
Span = tuple[int, int, int, Sequence[int]]


class Executor:
    """Runs a plan over KV blocks.

    Args:
        plan: the decoder.
        pool: threads and instruction set.
        kv: uint8 [blocks, block_bytes]; in a block, per layer, K then V in ``kv_dtype`` (layout: paceline_cpu.h).
        block_tokens: tokens per block, a multiple of 16.
        keep_states: behind K and V, blocks keep every row's state too: [block_tokens, hidden] in ``kv_dtype``.
    """

    def __init__(
        self,
        plan: DecoderPlan,
        pool: Pool,
        kv: Tensor,
        *,
        kv_dtype: torch.dtype,
        block_tokens: int,
        keep_states: bool = False,
    ) -> None:
        if block_tokens % LANES:
            raise ValueError(f"block_tokens is {block_tokens}; the CPU kernels need a multiple of {LANES}")
        kv_size = 2 * len(plan.layers) * block_tokens * plan.kv_heads * plan.head_dim * kv_dtype.itemsize
        size = kv_size + (block_tokens * plan.hidden * kv_dtype.itemsize if keep_states else 0)
        assert size <= kv.shape[1], f"a block of {kv.shape[1]} bytes holds less than {size}"
        self._plan, self._pool, self._kv = plan, pool, kv
        self._library = library()
        self._layers = (_Layer * len(plan.layers))(*(_layer(layer) for layer in plan.layers))
        self._model = _Model(
            len(plan.layers),
            plan.hidden,
            plan.ffn,
            plan.heads,
            plan.kv_heads,
            plan.head_dim,
            KV_CODES[plan.embedding.dtype],
            KV_CODES[kv_dtype],
            block_tokens,
            plan.eps,
            plan.rope_scale,
            plan.inv_freq.data_ptr(),
            plan.embedding.data_ptr(),
            pointer(plan.final_norm),
            ctypes.addressof(self._layers),
            linear_struct(plan.head),
            pointer(plan.vocab_ids),
            kv.data_ptr(),
            kv.shape[1],
            kv_size if keep_states else -1,
            LinearStruct() if plan.fc is None else linear_struct(plan.fc),
        )
        self.keeps_states = keep_states

    def forward(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        *,
        features: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Write the batch's K and V (and states, where they are kept) and compute logits.

        Args:
            tokens: ids, sequence after sequence; each below ``vocab``.
            spans: the sequences, in row order.
            wanted: rows to put through the head.
            features: for a plan with an fc, fp32 [rows, hidden].
            states: takes the wanted rows' states, fp32 [len(wanted), hidden]: what the head reads, unrounded.

        Returns:
            fp32 [len(wanted), head outputs].
        """
        logits = torch.empty(len(wanted), self._plan.head.out_features)
        batch = self._batch(tokens, spans, wanted, logits, features, states)
        status = self._library.pl_forward(
            ctypes.addressof(self._model), batch.address, self._pool.handle, self._pool.isa_code
        )
        check(status)
        return logits

    def draft_greedy(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        drafting: Sequence[tuple[int, int]],
        *,
        features: Tensor | None = None,
    ) -> list[list[int]]:
        """Run the batch and go on greedily for some of its sequences, one native call for all draft tokens.

        Args:
            tokens, spans, wanted: as for ``forward``; ``wanted`` has the last row of each drafting sequence.
            drafting: (index in spans, tokens to draft), in the order of ``wanted``; lengths at least 1.
            features: for a plan with an fc, those of the batch, fp32 [rows, hidden]; later rows read the state of
                the row before.

        Returns:
            Draft tokens per drafting sequence: token ids, also of a restricted vocabulary.
        """
        stride = max(length for _, length in drafting)
        out = (I32 * (stride * len(drafting)))()
        sequences, lengths = ((I32 * len(drafting))(*part) for part in zip(*drafting, strict=True))
        draft = _Draft(
            len(drafting), *(ctypes.addressof(array) for array in (sequences, lengths, out)), stride
        )
        batch = self._batch(tokens, spans, wanted, None, features, None)
        status = self._library.pl_draft_greedy(
            ctypes.addressof(self._model),
            batch.address,
            ctypes.addressof(draft),
            self._pool.handle,
            self._pool.isa_code,
        )
        check(status)
        return [out[i * stride : i * stride + length] for i, (_, length) in enumerate(drafting)]

    def read_states(self, spans: Sequence[Span]) -> Tensor:
        """States that forwards kept, rounded to the cache's type.

        Args:
            spans: as for ``forward``, of positions that were run; a start of -1 reads zeros before the first one.

        Returns:
            fp32 [rows, hidden], row after row of the spans.
        """
        assert self.keeps_states
        states = torch.empty(sum(count for _, count, _, _ in spans), self._plan.hidden)
        batch = _BatchArrays((), spans, (), None, None, None)
        self._library.pl_read_states(ctypes.addressof(self._model), batch.address, states.data_ptr())
        return states

    def _batch(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        logits: Tensor | None,
        features: Tensor | None,
        states: Tensor | None,
    ) -> "_BatchArrays":
        assert (features is None) == (self._plan.fc is None), (
            "a plan with an fc needs features, others have none"
        )
        for matrix, rows in ((features, len(tokens)), (states, len(wanted))):
            assert matrix is None or matrix.shape == (rows, self._plan.hidden)
            assert matrix is None or (matrix.dtype is torch.float32 and matrix.is_contiguous())
        return _BatchArrays(tokens, spans, wanted, logits, features, states)


class _BatchArrays:
    """A pl_batch and the arrays it points into."""

    def __init__(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        logits: Tensor | None,
        features: Tensor | None,
        states: Tensor | None,
    ) -> None:
        firsts, counts, starts, tables = zip(*spans, strict=True)
        flat = [block for table in tables for block in table]
        offsets, at = [], 0
        for table in tables:
            offsets.append(at)
            at += len(table)
        self._arrays = [
            (I32 * len(part))(*part) for part in (tokens, firsts, counts, starts, offsets, flat, wanted)
        ]
        addresses = (ctypes.addressof(array) for array in self._arrays)
        matrices = (pointer(matrix) for matrix in (logits, features, states))
        self._batch = _Batch(len(tokens), len(spans), len(wanted), *addresses, *matrices)
        self.address = ctypes.addressof(self._batch)


def _layer(layer: LayerPlan) -> _Layer:
    return _Layer(
        pointer(layer.attention_norm),
        layer.mlp_norm.data_ptr(),
        pointer(layer.q_norm),
        pointer(layer.k_norm),
        linear_struct(layer.qkv),
        linear_struct(layer.output),
        linear_struct(layer.gate_up),
        linear_struct(layer.down),
        layer.window or 0,
    )
