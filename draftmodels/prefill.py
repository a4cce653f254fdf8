"""Ragged prefills over many sequences at a time through the runner that serves, over KV memory of their own.

Sequences are cut into forwards by the target's rows; members of a steered model, whose prompts may have other lengths,
take the parts that end with the same tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.engine.batch import Batch
from paceline.server.engine.build import make_runner
from paceline.server.engine.kv_arena import KvArena, MemberShape
from paceline.server.engine.kv_blocks import BlockTable, KvBlocks
from paceline.server.models.attention import SequenceRows
from paceline.server.models.loader import LoadedModel

_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, stop) of one sequence in one forward."""

    index: int
    start: int
    stop: int

    def wanted(self, sequence: TokenSequence) -> int:
        """How many of its rows predict answer tokens: the last ones, but for the sequence's very last."""
        first, end = max(self.start, sequence.prompt_tokens - 1), min(self.stop, len(sequence.tokens) - 1)
        return max(0, end - first)

    def moved(self, ahead: int) -> "Piece":
        """The part with the same end of a sequence that is so many tokens longer in front."""
        start = 0 if self.start == 0 else max(0, self.start + ahead)
        return Piece(self.index, start, max(0, self.stop + ahead))


def batches_of(sequences: Sequence[TokenSequence], rows: int) -> Iterator[list[Piece]]:
    """Sequences in order, cut so that every forward but the last has ``rows`` rows."""
    batch, room = list[Piece](), rows
    for index, sequence in enumerate(sequences):
        start = 0
        while start < len(sequence.tokens):
            stop = min(len(sequence.tokens), start + room)
            batch.append(Piece(index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield batch
                batch, room = [], rows
    if batch:
        yield batch


def blocks_needed(batches: Sequence[Sequence[Piece]], ahead: Sequence[int]) -> int:
    """KV blocks that hold what is under way in any forward; ``ahead``: see ``Piece.moved``, by sequence."""
    ends = ([piece.moved(ahead[piece.index]).stop for piece in pieces] for pieces in batches)
    return max((sum(-(-end // _BLOCK_TOKENS) for end in own) for own in ends), default=1) or 1


class Prefill:
    """A model over ``num_blocks`` KV blocks."""

    def __init__(
        self, local: LocalEngine, model: LoadedModel, num_blocks: int, *, keeps_states: bool
    ) -> None:
        shape = MemberShape(f"{model.key}/prefill", model.config, model.kv_dtype, keeps_states=keeps_states)
        size = num_blocks * _BLOCK_TOKENS * shape.bytes_per_token
        arena = KvArena([shape], block_size=_BLOCK_TOKENS, total_bytes=size, device=local.device)
        self.num_blocks, self.keeps_states = num_blocks, keeps_states
        self._runner = make_runner(model, shape, arena, local.pool)
        self._blocks = KvBlocks(arena.num_blocks, prefix_caching=False)
        self._tables: dict[int, BlockTable] = {}
        self._dtype = shape.dtype

    def reset(self) -> None:
        """Forget sequences that an interrupted run has left."""
        for table in self._tables.values():
            self._blocks.release(table)
        self._tables.clear()

    def forward(self, sequences: Sequence[TokenSequence], pieces: Sequence[Piece]) -> Tensor:
        """Logits of the pieces' wanted rows, piece after piece, fp32 [rows, vocab]."""
        batch = Batch()
        for piece in pieces:
            sequence = sequences[piece.index]
            table = self._tables.setdefault(piece.index, BlockTable(self._runner.layout))
            if piece.start == piece.stop:
                continue
            grown = self._blocks.grow([(table, piece.stop)])
            assert grown, "more blocks in use than there can be"
            first = len(batch.tokens)
            batch.add(table, sequence.tokens[piece.start : piece.stop], num_wanted=0)
            table.num_computed = piece.stop
            end = first + min(piece.stop, len(sequence.tokens) - 1) - piece.start
            batch.wanted.extend(range(end - piece.wanted(sequence), end))
        if not batch.tokens:
            return torch.empty(0, self._runner.vocab_size, device=self._runner.device)
        return self._runner.forward(batch)

    def finish(self, index: int) -> Tensor | None:
        """States of a sequence that is done, [tokens, hidden], if they are kept; its blocks are free again."""
        table, states = self._tables.pop(index), None
        if self.keeps_states:
            found = self._runner.read_states([SequenceRows(0, table.num_computed, 0, table.blocks)])
            states = found.to(self._dtype)
        self._blocks.release(table)
        return states


@dataclass(frozen=True, slots=True)
class Reading:
    """A model over sequences of its own, which are so many tokens longer in front than those that pieces speak of."""

    prefill: Prefill
    sequences: Sequence[TokenSequence]
    ahead: Sequence[int]

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """See ``Prefill.forward``."""
        own = [piece.moved(self.ahead[piece.index]) for piece in pieces]
        return self.prefill.forward(self.sequences, own)

    def finish(self, index: int) -> Tensor | None:
        """See ``Prefill.finish``."""
        return self.prefill.finish(index)
