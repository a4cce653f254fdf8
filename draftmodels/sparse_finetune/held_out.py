"""How good a student is on held-out text: perplexity, KL to its teacher, agreement on the likeliest token.

Over the same tokens that CE learns, in the arithmetic of training. The teacher runs once; its last states are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.draftmodels.finetune.held_out import chunks, learnt_states, perplexity


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
            self._teacher_states = [
                learnt_states(self._teacher, batch, self._dtype) for batch in self._batches
            ]
        heads = student.head.to(self._dtype), self._teacher.head.to(self._dtype)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, theirs in zip(self._batches, self._teacher_states, strict=True):
            ours = learnt_states(student, batch, self._dtype)
            for part in chunks(len(ours)):
                log_q, log_p = (
                    F.linear(states[part].to(self._dtype), head).float().log_softmax(-1)
                    for states, head in zip((ours, theirs), heads, strict=True)
                )
                sums += _compared(log_p, log_q, batch.labels[part]).cpu()
        count = sum(len(batch.labels) for batch in self._batches)
        ce, teacher_ce, kl, same = (sums / max(count, 1)).tolist()
        return Quality(perplexity(ce), perplexity(teacher_ce), kl, same, count)


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
