"""What the target says about token sequences: its states, and how likely it finds the ids that a draft proposes.

One ragged prefill over many sequences at a time through the same runner that serves; rows go through the head in small
batches, so that full-vocabulary logits never take much memory. States come out of the KV cache, rounded as the drafts
that read them see them when served.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.engine.batch import Batch
from paceline.server.engine.build import make_runner
from paceline.server.engine.kv_arena import KvArena, MemberShape
from paceline.server.engine.kv_blocks import BlockTable, KvBlocks
from paceline.server.errors import ConfigError, DataError
from paceline.server.models.attention import SequenceRows

#: Token rows per forward: enough for the kernels' full speed, and at most this many rows of logits at a time.
ROWS = 256
_BLOCK_TOKENS = 16
#: Rows of logits that one thread normalises at a time; with a vocabulary of 49k they just fit its share of the caches.
_CHUNK_ROWS = 16


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The target's view of one sequence.

    Attributes:
        states: after its final norm, one row per token, [tokens, hidden] in the type of the KV cache.
        log_p: log-probabilities of proposable ids, normalised over the full vocabulary, [answer tokens, k]; row j
            predicts the j-th token of the answer. Columns are the proposable ids, ascending, or those of ``ids``.
        ids: with top-k, which of the proposable ids the columns are: indices, most likely first, int32
            [answer tokens, k].
        log_rest: with top-k, log of the exact mass of all other proposable ids, fp32 [answer tokens].
    """

    states: Tensor
    log_p: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None


class Teacher:
    """The target of an engine as a teacher.

    Args:
        local: whose target; used on its threads.
        vocab_ids: ids that the draft proposes, ascending, int32 [k]; None is all.
        top_k: keep only that many log-probabilities per row; None keeps all.
        dtype: of ``log_p``: fp16 rounds log-probabilities by at most one part in 2,048.
    """

    def __init__(
        self,
        local: LocalEngine,
        vocab_ids: Tensor | None,
        *,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        proposable = local.config.vocab_size if vocab_ids is None else len(vocab_ids)
        if top_k is not None and not 1 <= top_k <= proposable:
            raise ConfigError(f"top_k must be between 1 and the draft's {proposable} ids, not {top_k}")
        self._local, self._top_k, self._dtype = local, top_k, dtype
        target = local.target
        self._shape = MemberShape(f"{target.key}/teacher", target.config, target.kv_dtype, keeps_states=True)
        self._vocab_ids = None if vocab_ids is None else vocab_ids.long().to(local.device)
        self._prefill: _Prefill | None = None

    def rows(
        self,
        sequences: Sequence[TokenSequence],
        temperature: float = 1.0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[TeacherRows]:
        """Run the target over sequences.

        Args:
            sequences: each within the target's context.
            temperature: above 0; logits are divided by it.
            progress: told (done, total) sequences.

        Returns:
            One entry per sequence, in order, on the target's device.

        Raises:
            DataError: a sequence longer than the target's context.
            ConfigError: a temperature that is not above 0.
        """
        if not temperature > 0:
            raise ConfigError(f"a teacher's temperature must be above 0, not {temperature}")
        prefill = self._prefill_for(sequences)
        parts: list[list[_Columns]] = [[] for _ in sequences]
        rows: list[TeacherRows] = []
        with self._local.exclusive(), torch.no_grad(), self._normaliser(temperature) as columns:
            for pieces in _batches(sequences):
                logits = prefill.forward(sequences, pieces)
                counts = [piece.wanted(sequences[piece.index]) for piece in pieces]
                for piece, part in zip(pieces, columns(logits).split(counts), strict=True):
                    parts[piece.index].append(part)
                    if piece.stop == len(sequences[piece.index].tokens):
                        rows.append(_joined(prefill.take_states(piece.index), parts[piece.index]))
                        parts[piece.index] = []
                if progress is not None:
                    progress(len(rows), len(sequences))
        return rows

    def _prefill_for(self, sequences: Sequence[TokenSequence]) -> "_Prefill":
        """A prefill with room for the longest sequence; no blocks are in use."""
        longest, context = (
            max((len(s.tokens) for s in sequences), default=1),
            self._shape.config.context_length,
        )
        if longest > context:
            raise DataError(f"a sequence of {longest} tokens does not fit the target's context of {context}")
        if self._prefill is None or self._prefill.longest < longest:
            self._prefill = _Prefill(self._local, self._shape, longest)
        self._prefill.reset()
        return self._prefill

    @contextmanager
    def _normaliser(self, temperature: float) -> "Iterator[Callable[[Tensor], _Columns]]":
        """Logits to columns: chunk by chunk, on as many threads as the kernels have; CUDA and torch use their own."""

        def one(logits: Tensor) -> _Columns:
            return _columns(logits, temperature, self._vocab_ids, self._top_k, self._dtype)

        pool = self._local.pool
        if pool is None:
            yield one
            return
        with ThreadPoolExecutor(pool.threads) as threads:
            yield lambda logits: _stacked(list(threads.map(one, torch.split(logits, _CHUNK_ROWS))))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions [start, stop) of one sequence in one forward."""

    index: int
    start: int
    stop: int

    def wanted(self, sequence: TokenSequence) -> int:
        """How many of its rows predict answer tokens: the last ones, but for the sequence's very last."""
        first, end = max(self.start, sequence.prompt_tokens - 1), min(self.stop, len(sequence.tokens) - 1)
        return max(0, end - first)


def _batches(sequences: Sequence[TokenSequence]) -> Iterator[list[_Piece]]:
    """Sequences in order, cut so that every forward but the last has ``ROWS`` rows."""
    batch, room = list[_Piece](), ROWS
    for index, sequence in enumerate(sequences):
        start = 0
        while start < len(sequence.tokens):
            stop = min(len(sequence.tokens), start + room)
            batch.append(_Piece(index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield batch
                batch, room = [], ROWS
    if batch:
        yield batch


class _Prefill:
    """The target over KV memory of its own, with room for what ``_batches`` has under way.

    Args:
        longest: tokens of the longest sequence.
    """

    def __init__(self, local: LocalEngine, shape: MemberShape, longest: int) -> None:
        # Of the sequences in a forward only the first can have more blocks than it has rows there.
        blocks = -(-longest // _BLOCK_TOKENS) + ROWS
        size = blocks * _BLOCK_TOKENS * shape.bytes_per_token
        arena = KvArena([shape], block_size=_BLOCK_TOKENS, total_bytes=size, device=local.device)
        self.longest = longest
        self._runner = make_runner(local.target, shape, arena, local.pool)
        self._blocks = KvBlocks(arena.num_blocks, prefix_caching=False)
        self._tables: dict[int, BlockTable] = {}
        self._dtype = shape.dtype

    def reset(self) -> None:
        """Forget sequences that an interrupted run has left."""
        for table in self._tables.values():
            self._blocks.release(table)
        self._tables.clear()

    def forward(self, sequences: Sequence[TokenSequence], pieces: Sequence[_Piece]) -> Tensor:
        """Logits of the pieces' wanted rows, piece after piece, fp32 [rows, vocab]."""
        batch = Batch()
        for piece in pieces:
            sequence = sequences[piece.index]
            table = self._tables.setdefault(piece.index, BlockTable(self._runner.layout))
            grown = self._blocks.grow([(table, piece.stop)])
            assert grown, "more blocks in use than there can be"
            first = len(batch.tokens)
            batch.add(table, sequence.tokens[piece.start : piece.stop], num_wanted=0)
            table.num_computed = piece.stop
            end = first + min(piece.stop, len(sequence.tokens) - 1) - piece.start
            batch.wanted.extend(range(end - piece.wanted(sequence), end))
        return self._runner.forward(batch)

    def take_states(self, index: int) -> Tensor:
        """States of a sequence that is done, [tokens, hidden]; its blocks are free again."""
        table = self._tables.pop(index)
        states = self._runner.read_states([SequenceRows(0, table.num_computed, 0, table.blocks)])
        self._blocks.release(table)
        return states.to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Columns:
    """``log_p``, ``ids`` and ``log_rest`` of ``TeacherRows`` for some rows."""

    log_p: Tensor
    ids: Tensor | None
    log_rest: Tensor | None

    def split(self, counts: Sequence[int]) -> "list[_Columns]":
        """Row by row parts of the given sizes."""
        log_p = torch.split(self.log_p, list(counts))
        if self.ids is None or self.log_rest is None:
            return [_Columns(part, None, None) for part in log_p]
        others = zip(log_p, *(torch.split(t, list(counts)) for t in (self.ids, self.log_rest)), strict=True)
        return [_Columns(*part) for part in others]


def _columns(
    logits: Tensor, temperature: float, vocab_ids: Tensor | None, top_k: int | None, dtype: torch.dtype
) -> _Columns:
    """Normalise rows over all of the vocabulary and keep what is asked for; see ``TeacherRows``."""
    scaled = logits if temperature == 1 else logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    own = scaled if vocab_ids is None else scaled.index_select(1, vocab_ids)
    log_p = own - total
    if top_k is None:
        return _Columns(log_p.to(dtype), None, None)
    best = log_p.topk(top_k, dim=-1)
    rest = log_p.scatter(1, best.indices, -math.inf).logsumexp(-1)
    return _Columns(best.values.to(dtype), best.indices.int(), rest)


def _stacked(parts: Sequence[_Columns]) -> _Columns:
    if len(parts) == 1:
        return parts[0]
    ids = [part.ids for part in parts if part.ids is not None]
    rests = [part.log_rest for part in parts if part.log_rest is not None]
    return _Columns(
        torch.cat([part.log_p for part in parts]),
        torch.cat(ids) if ids else None,
        torch.cat(rests) if rests else None,
    )


def _joined(states: Tensor, parts: Sequence[_Columns]) -> TeacherRows:
    columns = _stacked(parts)
    return TeacherRows(states, columns.log_p, columns.ids, columns.log_rest)
