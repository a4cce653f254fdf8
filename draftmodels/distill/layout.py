"""Where the rows of a training batch lie: sequences of different lengths, packed for matrices, padded for attention.

A sequence of n tokens gives n - 1 rows (position i predicts token i + 1). Rows are packed, so that linear layers do no
work on padding; attention pads them to [batch, width]. *Answer rows* are those whose prediction counts: from the last
prompt token on. Unrolled step k (from 1) at answer row r means: the target verified up to row r - k + 1, the draft went
on alone from there; the first k - 1 answer rows of a sequence have no such history. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Tokens(Protocol):
    """A prompt and its answer, as ``data.sequences.TokenSequence`` holds them."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids, prompt first."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """How many of them are the prompt, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Padded:
    """A padded place for packed rows: row i goes to flat slot ``slots[i]`` of [batch, width]."""

    slots: Tensor  # int64 [rows]
    batch: int
    width: int

    def spread(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [batch, width, ...], zeros between."""
        flat = rows.new_zeros(self.batch * self.width, *rows.shape[1:])
        return flat.index_copy(0, self.slots, rows).view(self.batch, self.width, *rows.shape[1:])

    def collect(self, padded: Tensor) -> Tensor:
        """The inverse of ``spread``."""
        return padded.flatten(0, 1).index_select(0, self.slots)

    def only(self, rows: Tensor) -> "Padded":
        """The places of some of the rows."""
        return Padded(self.slots[rows], self.batch, self.width)


@dataclass(frozen=True)
class BatchLayout:
    """The index tensors of one batch.

    Attributes:
        tokens, positions: int64 [rows].
        answers: int64 [answer_rows], indices of rows.
        place: of all rows, [batch, longest].
        answer_place: of the answer rows, [batch, longest answer].
        lengths, first_answer: int64 [batch], rows of each sequence and the position of its first answer row.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor
    place: Padded
    answer_place: Padded
    lengths: Tensor
    first_answer: Tensor
    _masks: dict[tuple[int, bool, int | None], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def _index_in_answer(self) -> Tensor:
        return self.answer_place.slots % self.answer_place.width

    def step_rows(self, step: int) -> Tensor:
        """The answer rows that have a history of ``step`` draft steps, as indices of answer rows."""
        return (self._index_in_answer >= step - 1).nonzero().squeeze(-1)

    def continued(self, step: int) -> Tensor:
        """Which rows of ``step_rows(step - 1)`` the rows of ``step`` continue: each one's predecessor."""
        before = torch.full_like(self._index_in_answer, -1)
        earlier = self.step_rows(step - 1)
        before[earlier] = torch.arange(len(earlier), device=before.device)
        return before[self.step_rows(step) - 1]

    def mask(self, step: int, *, answers: bool, window: int | None) -> Tensor:
        """Who sees whom: bool [batch, 1, queries, keys].

        Keys are the step-1 keys of all rows, then for m = 2..step those of step m in answer places. A query of step k
        at position t sees step-1 keys up to t - k + 1 and its own chain: of step m, the key at t - k + m.

        Args:
            answers: queries are the answer rows only; else all rows (step 1).
            window: how many latest positions are seen; None is all.
        """
        key = (step, answers, window)
        if key not in self._masks:
            self._masks[key] = self._build_mask(step, answers, window)
        return self._masks[key]

    def _build_mask(self, step: int, answers: bool, window: int | None) -> Tensor:
        device, batch = self.tokens.device, self.place.batch
        width = self.answer_place.width if answers else self.place.width
        queries = torch.arange(width, device=device)
        starts = self.first_answer if answers else torch.zeros_like(self.first_answer)
        # Padding queries look where the last real one does: a query that sees nothing would be NaN.
        at = torch.minimum(starts[:, None] + queries, self.lengths[:, None] - 1)
        keys = torch.arange(self.place.width, device=device)
        seen = keys <= (at - step + 1).clamp(min=0)[:, :, None]
        if window is not None:
            seen &= at[:, :, None] - keys < window
        chain = [queries[:, None] - queries == step - m for m in range(2, step + 1)]
        parts = [seen, *(own.expand(batch, -1, -1) for own in chain)]
        return torch.cat(parts, -1)[:, None]


def lay_out(sequences: Sequence[Tokens], device: torch.device | None = None) -> BatchLayout:
    """The layout of a batch; every sequence has at least one prompt and one answer token."""
    lengths = [len(s.tokens) - 1 for s in sequences]
    firsts = [s.prompt_tokens - 1 for s in sequences]
    assert all(0 <= first < length for first, length in zip(firsts, lengths, strict=True))
    width, count = max(lengths), len(sequences)
    answer_width = max(length - first for first, length in zip(firsts, lengths, strict=True))
    position = [i for length in lengths for i in range(length)]
    slots = [b * width + i for b, length in enumerate(lengths) for i in range(length)]
    answers: list[int] = []
    answer_slots: list[int] = []
    start = 0
    for b, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        answers += range(start + first, start + length)
        answer_slots += range(b * answer_width, b * answer_width + length - first)
        start += length

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return BatchLayout(
        tokens=tensor([token for s in sequences for token in s.tokens[:-1]]),
        positions=tensor(position),
        answers=tensor(answers),
        place=Padded(tensor(slots), count, width),
        answer_place=Padded(tensor(answer_slots), count, answer_width),
        lengths=tensor(lengths),
        first_answer=tensor(firsts),
    )
