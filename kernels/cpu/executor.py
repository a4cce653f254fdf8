"""The CPU executor: one native call per ragged forward of a ``plan.DecoderPlan``.

Turns the plan into C structs that point into its tensors (kept alive here) and runs batches. Knows nothing of requests,
schedulers or checkpoints.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.cpu.drafting import DraftArrays, Drafted, Draw
from paceline.kernels.cpu.library import (
    F32,
    I32,
    I64,
    PTR,
    LinearStruct,
    Pool,
    check,
    flat_tables,
    library,
    linear_struct,
    pointer,
)
from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.formats import LANES

#: Models in one native call (PL_MOST_TOGETHER).
MOST_TOGETHER = 8
KV_CODES = {torch.float32: 0, torch.bfloat16: 1}


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
        prepared = self.prepare(tokens, spans, wanted, features=features, states=states)
        forward_together([prepared])
        return prepared.logits

    def prepare(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        *,
        features: Tensor | None = None,
        states: Tensor | None = None,
    ) -> "Prepared":
        """A forward to run later, with others (``forward_together``); arguments as for ``forward``."""
        logits = torch.empty(len(wanted), self._plan.head.out_features)
        batch = self._batch(tokens, spans, wanted, logits, features, states)
        return Prepared(logits, ctypes.addressof(self._model), self._pool, batch)

    def draft(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        draws: Sequence[Draw],
        *,
        columns: int | None = None,
        features: Tensor | None = None,
        kept: "tuple[Executor, Sequence[Sequence[int]]] | None" = None,
    ) -> list[Drafted]:
        """Run the batch and go on for some of its sequences, one native call for all draft tokens.

        Args:
            tokens, spans, wanted: as for ``forward``; ``wanted`` has the last row of each drafting sequence.
            draws: the drafting sequences, in the order of ``wanted``.
            columns: logits that may be drawn, the first ones; None is all.
            features: for a plan with an fc, those of the batch, fp32 [rows, hidden]; later rows read the state of
                the row before.
            kept: in the place of features, who kept the states before the rows, and its blocks of each sequence.

        Returns:
            Draft tokens per drafting sequence: token ids, also of a restricted vocabulary.
        """
        columns = columns or self._plan.head.out_features
        if kept is None:
            draft = DraftArrays(draws, columns)
            batch = self._batch(tokens, spans, wanted, None, features, None)
        else:
            target, tables = kept
            assert target.keeps_states
            assert target._plan.hidden == self._plan.hidden
            assert len(tables) == len(spans)
            draft = DraftArrays(draws, columns, ctypes.addressof(target._model), tables)
            batch = _BatchArrays(tokens, spans, wanted, None, None, None)
        status = self._library.pl_draft_blocks(
            ctypes.addressof(self._model),
            batch.address,
            draft.address,
            self._pool.handle,
            self._pool.isa_code,
        )
        check(status)
        return draft.drafted()

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


@dataclass(frozen=True)
class Prepared:
    """A forward of one executor that has yet to run.

    Attributes:
        logits: fp32 [wanted, head outputs], to be filled.
        model: address of the executor's pl_model.
        pool: of the executor.
    """

    logits: Tensor
    model: int
    pool: Pool
    batch: "_BatchArrays"


def forward_together(forwards: Sequence[Prepared]) -> None:
    """Run forwards of models of as many layers and one pool, phase by phase together; fills their ``logits``.

    A phase then has the items of all of them: small models leave the threads less to wait for. Each row has the bits
    that it has alone. More than ``MOST_TOGETHER`` go in several calls.
    """
    for start in range(0, len(forwards), MOST_TOGETHER):
        part = forwards[start : start + MOST_TOGETHER]
        pool = part[0].pool
        assert all(forward.pool is pool for forward in part), "executors of different pools"
        models = (PTR * len(part))(*(forward.model for forward in part))
        batches = (PTR * len(part))(*(forward.batch.address for forward in part))
        check(
            library().pl_forward(
                ctypes.addressof(models), ctypes.addressof(batches), len(part), pool.handle, pool.isa_code
            )
        )


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
        integers = [(I32 * len(part))(*part) for part in (tokens, firsts, counts, starts, wanted)]
        self._arrays = [*integers[:4], *flat_tables(tables), *integers[4:]]
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
