"""The sequences that a round trains on, with what the teacher says about them, and batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.distill.layout import BatchLayout, Tokens, lay_out
from paceline.draftmodels.distill.objective import Rows, TeacherBatch


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence; ``rows`` are None on ranks that do not train it."""

    sequence: Tokens
    rows: Rows | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step needs.

    Attributes:
        states: the target's state before each row's token, fp32 [rows, hidden]; None for drafts that read none.
        labels: index of each answer row's next token among the proposable ids, -1 outside; int64 [answer rows].
    """

    layout: BatchLayout
    teacher: TeacherBatch
    labels: Tensor
    states: Tensor | None


def make_batch(
    entries: Sequence[Entry], device: torch.device, label_of: Tensor | None, *, with_states: bool
) -> Batch:
    """Join entries that this rank trains.

    Args:
        label_of: int64 [vocabulary], index of each id among the proposable ones, -1 for others; None: all are.
    """
    sequences = [entry.sequence for entry in entries]
    rows = [entry.rows for entry in entries if entry.rows is not None]
    assert len(rows) == len(entries)
    labels = torch.tensor([token for s in sequences for token in s.tokens[s.prompt_tokens :]], device=device)
    return Batch(
        layout=lay_out(sequences, device),
        teacher=TeacherBatch.of(rows, device),
        labels=labels if label_of is None else label_of[labels],
        states=torch.cat([_before(r.states) for r in rows]).to(device) if with_states else None,
    )


def labels_among(ids: Tensor | None, vocab_size: int, device: torch.device) -> Tensor | None:
    """``label_of`` for ``make_batch``."""
    if ids is None:
        return None
    label_of = torch.full((vocab_size,), -1, dtype=torch.long)
    label_of[ids.long()] = torch.arange(len(ids))
    return label_of.to(device)


def _before(states: Tensor) -> Tensor:
    """States [tokens, hidden] -> the state before each row's token [tokens - 1, hidden]: zeros, h_0, h_1, ..."""
    wide = states[:-2].float()
    return torch.cat((wide.new_zeros(1, wide.shape[1]), wide))
