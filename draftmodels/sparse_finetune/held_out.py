"""How good a student is on held-out text: perplexity, KL to its teacher, agreement on the likeliest token.

Over the same tokens that CE learns, in the arithmetic of training. The teacher runs once; its last states are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.sparse_finetune.batch import Batch, grouped, make_batch
from paceline.draftmodels.sparse_finetune.decoder import Decoder
from paceline.draftmodels.sparse_finetune.objective import CHUNK_ROWS


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a student on held-out text.

    Attributes:
        perplexity, teacher_perplexity: exp of the mean cross entropy.
        kl: mean KL(teacher || student), nats per token.
        top1_agreement: share of tokens where both have the same likeliest one.
        n_tokens: how many tokens that is over.
    """

    perplexity: float
    teacher_perplexity: float
    kl: float
    top1_agreement: float
    n_tokens: int


class HeldOut:
    """Measures students on some sequences.

    Args:
        rows: tokens per forward.
        dtype: of matrix products.
        answers_only: whether prompts are left out, see ``make_batch``.
    """

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        teacher: Decoder,
        *,
        rows: int,
        dtype: torch.dtype,
        answers_only: bool,
    ) -> None:
        device = teacher.head.device
        self._teacher, self._dtype = teacher, dtype
        self._batches = [
            make_batch(group, device, answers_only=answers_only) for group in grouped(sequences, rows)
        ]
        self._teacher_states: list[Tensor] | None = None

    @torch.no_grad()
    def measure(self, student: Decoder) -> Quality:
        """Run the student over everything."""
        if self._teacher_states is None:
            self._teacher_states = [self._learnt_states(self._teacher, batch) for batch in self._batches]
        heads = student.head.to(self._dtype), self._teacher.head.to(self._dtype)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, theirs in zip(self._batches, self._teacher_states, strict=True):
            ours = self._learnt_states(student, batch)
            for start in range(0, len(ours), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                log_q, log_p = (
                    F.linear(states[part].to(self._dtype), head).float().log_softmax(-1)
                    for states, head in zip((ours, theirs), heads, strict=True)
                )
                sums += _compared(log_p, log_q, batch.labels[part]).cpu()
        count = sum(len(batch.labels) for batch in self._batches)
        ce, teacher_ce, kl, same = (sums / max(count, 1)).tolist()
        return Quality(_exp(ce), _exp(teacher_ce), kl, same, count)

    def _learnt_states(self, model: Decoder, batch: Batch) -> Tensor:
        with torch.autocast(model.head.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            states: Tensor = model(batch)[-1][batch.learnt]
        return states


def _exp(nats: float) -> float:
    """Finite also for a student that is broken beyond measure."""
    return math.exp(min(nats, 700.0))


def _compared(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """Sums over rows of CE, the teacher's CE, KL and agreement, fp64 [4]."""
    index = labels[:, None]
    return torch.stack(
        (
            -log_q.gather(-1, index).sum(),
            -log_p.gather(-1, index).sum(),
            (log_p.exp() * (log_p - log_q)).sum(),
            (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
        )
    ).double()
