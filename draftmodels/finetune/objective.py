"""The loss L = w_ce CE + w_kl KL(teacher || student) + w_sq SquareHead (2310.06927), and its gradients.

A step may be several forwards, on several ranks: means are over the whole step, so that how it was cut does not show.
CE and KL go through the head in chunks of rows, their gradients in closed form, so that never more than a chunk of
[rows, vocabulary] is in memory; ``losses`` is the oracle. Knows nothing of masks and optimisers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.finetune.batch import Batch
from paceline.draftmodels.losses import square_head

#: Rows of logits at a time: with 49k ids 25 MB in fp32, and enough rows for the matrix products' full speed.
CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What means are over: a whole step, all its forwards on all ranks.

    Attributes:
        rows: positions that are not padding.
        learnt: positions with CE and KL.
        mean_squares: mean(H_t^2) of each layer, fp64 [layers]; empty without SquareHead.
    """

    rows: int
    learnt: int
    mean_squares: Tensor


@dataclass(frozen=True, slots=True)
class Figures:
    """Parts of the loss before their weights; those of a step's forwards sum to the step's."""

    ce: float = 0.0
    kl: float = 0.0
    sq: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(self.ce + other.ce, self.kl + other.kl, self.sq + other.sq)


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the teacher says about a batch: its states (``Decoder.forward``) and its head [vocabulary, hidden]."""

    states: Sequence[Tensor]
    head: Tensor


@dataclass(frozen=True)
class Objective:
    """The weighted sum; a part of weight 0 is not computed.

    Attributes:
        dtype: that heads multiply in; all else is fp32.
    """

    w_ce: float = 1.0
    w_kl: float = 0.0
    w_sq: float = 1.0
    dtype: torch.dtype = torch.float32
    chunk_rows: int = field(default=CHUNK_ROWS, repr=False)

    def loss(self, figures: Figures) -> float:
        """The weighted sum."""
        return self.w_ce * figures.ce + self.w_kl * figures.kl + self.w_sq * figures.sq

    def backward(
        self,
        batch: Batch,
        states: Sequence[Tensor],
        head: Tensor,
        teaching: Teaching | None,
        totals: StepTotals,
    ) -> Figures:
        """Losses of one forward of a step, and their gradients on everything that requires one.

        Args:
            states: the student's, [rows, hidden] each.
            head: the model's, [vocabulary, hidden].
            teaching: the teacher's view of the same batch; None where only CE has a weight.
        """
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        ce = kl = sq = 0.0
        if self.w_ce or self.w_kl:
            ce, kl, gradient = self._through_head(batch, states[-1], head, teaching, totals)
            roots.append(states[-1])
            gradients.append(gradient)
        if self.w_sq:
            assert teaching is not None
            ratios = square_head(states, teaching.states, rows=totals.rows, mean_squares=totals.mean_squares)
            summed = ratios.sum()
            sq = float(summed.detach())
            roots.append(self.w_sq * summed)
            gradients.append(None)
        torch.autograd.backward(roots, gradients)
        return Figures(ce, kl, sq)

    @torch.no_grad()
    def _through_head(
        self,
        batch: Batch,
        states: Tensor,
        head: Tensor,
        teaching: Teaching | None,
        totals: StepTotals,
    ) -> tuple[float, float, Tensor]:
        """(CE, KL, gradient on the states); the head's own gradient is added to it."""
        gradient = torch.zeros_like(states)
        weight = head.to(self.dtype)
        theirs = None if teaching is None or not self.w_kl else teaching.head.to(self.dtype)
        sums = states.new_zeros(2)
        scale = 1.0 / max(totals.learnt, 1)
        for rows, labels in zip(
            torch.split(batch.learnt, self.chunk_rows),
            torch.split(batch.labels, self.chunk_rows),
            strict=True,
        ):
            x = states[rows].to(self.dtype)
            logits = F.linear(x, weight).float()
            log_p = None
            if theirs is not None:
                assert teaching is not None
                log_p = F.linear(teaching.states[-1][rows].to(self.dtype), theirs).float().log_softmax(-1)
            ce, kl, on_logits = self._on_logits(logits, labels, log_p)
            sums += torch.stack((ce, kl))
            narrow = on_logits.mul_(scale).to(self.dtype)
            gradient[rows] = (narrow @ weight).to(gradient)
            if head.requires_grad:
                more = (narrow.T @ x).to(head)
                head.grad = more if head.grad is None else head.grad.add_(more)
        ce_sum, kl_sum = (sums * scale).tolist()
        return ce_sum, kl_sum, gradient

    def _on_logits(
        self, logits: Tensor, labels: Tensor, log_p: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of CE, sum of KL, gradient on the logits of w_ce CE + w_kl KL), from [rows, vocabulary]."""
        log_q = logits.log_softmax(-1)
        index = labels[:, None]
        ce, kl = -log_q.gather(-1, index).sum(), logits.new_zeros(())
        gradient = log_q.exp().mul_(self.w_ce + self.w_kl)
        gradient.scatter_add_(-1, index, torch.full_like(index, -self.w_ce, dtype=gradient.dtype))
        if log_p is not None:
            p = log_p.exp()
            kl = (log_p - log_q).mul_(p).sum()
            gradient.sub_(p, alpha=self.w_kl)
        return ce, kl, gradient
