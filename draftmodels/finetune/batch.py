"""Batches of whole sequences: packed rows for matrices, padded places for attention, and which rows are learnt.

Every token is a row, the last one of a sequence too: SquareHead compares states at all positions that are not padding.
Sequences of similar length go into one forward, so that attention pads little. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill.layout import Padded


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward needs.

    Attributes:
        tokens, positions: int64 [rows].
        place: of the rows, [sequences, longest].
        learnt: int64 [learnt rows], rows whose next token has a loss.
        labels: int64 [learnt rows], those tokens.
    """

    tokens: Tensor
    positions: Tensor
    place: Padded
    learnt: Tensor
    labels: Tensor

    @property
    def rows(self) -> int:
        """Positions that are not padding."""
        return len(self.tokens)


def make_batch(sequences: Sequence[TokenSequence], device: torch.device, *, answers_only: bool) -> Batch:
    """Lay sequences out.

    Args:
        answers_only: leave the tokens of prompts unlearnt; else all but the first are learnt.
    """
    lengths = [len(s.tokens) for s in sequences]
    width, start = max(lengths), 0
    slots: list[int] = []
    learnt: list[int] = []
    labels: list[int] = []
    for index, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        slots += range(index * width, index * width + length)
        first = sequence.prompt_tokens if answers_only else 1
        learnt += range(start + first - 1, start + length - 1)
        labels += sequence.tokens[first:]
        start += length

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        tokens=tensor([token for s in sequences for token in s.tokens]),
        positions=tensor([i for length in lengths for i in range(length)]),
        place=Padded(tensor(slots), len(sequences), width),
        learnt=tensor(learnt),
        labels=tensor(labels),
    )


def grouped(sequences: Sequence[TokenSequence], rows: int) -> list[list[TokenSequence]]:
    """Sequences in groups of similar length, each of at most ``rows`` tokens (or one longer sequence)."""
    groups: list[list[TokenSequence]] = []
    filled = 0
    for sequence in sorted(sequences, key=lambda s: len(s.tokens)):
        if not groups or filled + len(sequence.tokens) > rows:
            groups.append([])
            filled = 0
        groups[-1].append(sequence)
        filled += len(sequence.tokens)
    return groups
