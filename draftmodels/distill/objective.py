"""The training objective: distances between the teacher's rows and the draft's, over every unrolled step.

Takes states that the head reads (``modules``), makes logits in chunks of rows, and leaves gradients on the states, so
that never more than one chunk of [rows, vocabulary] is in memory. The teacher's rows may be dense over the ids that
the draft proposes (a sub-distribution if those are not all) or its top-k with the remaining mass. Knows nothing of how
drafts work or where teachers come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels import losses
from paceline.draftmodels.distill import fused

#: Elements of one chunk's [rows, vocabulary] buffers; a few of them then fit a last-level cache (4 MB each in fp32).
CHUNK_ELEMENTS = 1 << 20


class Rows(Protocol):
    """What a teacher says about one sequence, as ``teacher.TeacherRows`` holds it."""

    @property
    def states(self) -> Tensor:
        """Target's states after its final norm, [tokens, hidden]."""
        ...

    @property
    def log_p(self) -> Tensor:
        """[answer tokens, k], normalised over the full vocabulary."""
        ...

    @property
    def ids(self) -> Tensor | None:
        """Which of the proposable ids the columns are, [answer tokens, k]; None: all, in order."""
        ...

    @property
    def log_rest(self) -> Tensor | None:
        """With ``ids``: log of the mass on the other proposable ids, [answer tokens]."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """The teacher's rows of a batch, one per answer row; see ``Rows``."""

    log_p: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Rows], device: torch.device) -> "TeacherBatch":
        """Join sequences."""
        log_p = torch.cat([r.log_p for r in rows]).to(device)
        ids = [r.ids for r in rows if r.ids is not None]
        rest = [r.log_rest for r in rows if r.log_rest is not None]
        if not ids:
            return cls(log_p)
        return cls(log_p, torch.cat(ids).to(device).long(), torch.cat(rest).to(device))

    def compare(self, rows: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(log p, log q) of some rows over common categories, fp32.

        Args:
            rows: int64 [rows], which answer rows.
            log_q: the draft over all proposable ids, [rows, vocabulary].
        """
        log_p = self.log_p[rows].float()
        if self.ids is None or self.log_rest is None:
            return log_p, log_q
        return losses.top_k_buckets(log_q, self.ids[rows], log_p, self.log_rest[rows].float())


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Sums over the rows of one unrolled step.

    Attributes:
        rows: how many rows had a loss.
        alpha_rows: how many rows ``alpha`` is over.
        loss, alpha: sums of losses in nats and of sum_v min(p, q).
    """

    rows: int
    alpha_rows: int
    loss: float
    alpha: float


@dataclass(frozen=True)
class Objective:
    """Weighted sum over unrolled steps of the mean loss per row.

    Attributes:
        loss: name in ``losses.LOSSES``, ``jsd:BETA``, or ``ce``: the sequences' own next tokens as labels.
        temperature: logits are divided by it; the teacher's rows must be of the same temperature.
        step_weights: one per unrolled step.
        dtype: that the head multiplies in; all else is fp32.
    """

    loss: str
    temperature: float = 1.0
    step_weights: tuple[float, ...] = (1.0,)
    dtype: torch.dtype = torch.float32
    chunk_elements: int = field(default=CHUNK_ELEMENTS, repr=False)

    def backward(
        self,
        outputs: Sequence[Tensor],
        head: Tensor,
        teacher: TeacherBatch,
        step_rows: Sequence[Tensor],
        labels: Tensor,
        *,
        totals: Sequence[int] | None = None,
        taid: float | None = None,
    ) -> list[StepFigures]:
        """Losses of a batch, and their gradients on everything that requires one.

        Args:
            outputs: per step, [rows of the step, hidden].
            head: [vocabulary, hidden].
            teacher: one row per answer row.
            step_rows: per step, int64 indices of answer rows.
            labels: for ``ce``, int64 [answer rows], index of the next token among the proposable ids, -1 if it is not
                one of them (no loss there).
            totals: per step, the rows to divide by; by default those with a loss. Data parallel jobs give the sum
                over all processes, so that summed gradients are those of one process.
            taid: the teacher's share of the interpolated teacher; None is the teacher itself.
        """
        head = head if head.requires_grad else head.to(self.dtype)
        figures, gradients = [], []
        for index, (output, rows) in enumerate(zip(outputs, step_rows, strict=True)):
            counted = self.rows_with_loss(rows, labels)
            total = counted if totals is None else totals[index]
            scale = self.step_weights[index] / max(total, 1)
            leaf = output.detach().requires_grad_()
            figures.append(self._step(leaf, head, teacher, rows, labels, scale, taid))
            gradients.append(torch.zeros_like(output) if leaf.grad is None else leaf.grad)
        if any(output.requires_grad for output in outputs):
            torch.autograd.backward(list(outputs), gradients)
        return figures

    def rows_with_loss(self, rows: Tensor, labels: Tensor) -> int:
        """How many of some answer rows have a loss."""
        return int((labels[rows] >= 0).sum()) if self.loss == "ce" else len(rows)

    def _step(
        self,
        leaf: Tensor,
        head: Tensor,
        teacher: TeacherBatch,
        rows: Tensor,
        labels: Tensor,
        scale: float,
        taid: float | None,
    ) -> StepFigures:
        leaf.grad = torch.zeros_like(leaf)
        loss_sum, alpha_sum = leaf.new_zeros(()), leaf.new_zeros(())
        chunk = max(self.chunk_elements // len(head), 1)
        for start in range(0, len(rows), chunk):
            part, own = rows[start : start + chunk], slice(start, start + chunk)
            if teacher.ids is None and taid is None:
                loss, alpha = self._closed_form(leaf, own, head, teacher.log_p[part], labels[part], scale)
            else:
                loss, alpha = self._autograd(leaf, own, head, teacher, part, labels[part], scale, taid)
            loss_sum += loss
            alpha_sum += alpha
        return StepFigures(self.rows_with_loss(rows, labels), len(rows), float(loss_sum), float(alpha_sum))

    @torch.no_grad()
    def _closed_form(
        self, leaf: Tensor, own: slice, head: Tensor, log_p: Tensor, labels: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        x, weight = leaf[own].to(self.dtype), head.to(self.dtype)
        logits = F.linear(x, weight).float().div_(self.temperature)
        if self.loss == "ce":
            loss, alpha, gradient = fused.label_value_and_gradient(log_p, logits, labels)
        else:
            loss, alpha, gradient = fused.value_and_gradient(self.loss, log_p, logits)
        narrow = gradient.mul_(scale / self.temperature).to(self.dtype)
        assert leaf.grad is not None
        leaf.grad[own] = (narrow @ weight).to(leaf.dtype)
        if head.requires_grad:
            more = (narrow.T @ x).to(head.dtype)
            head.grad = more if head.grad is None else head.grad.add_(more)
        return loss.sum(), alpha.sum()

    def _autograd(
        self,
        leaf: Tensor,
        own: slice,
        head: Tensor,
        teacher: TeacherBatch,
        part: Tensor,
        labels: Tensor,
        scale: float,
        taid: float | None,
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(leaf[own].to(self.dtype), head.to(self.dtype)).float() / self.temperature
        log_p, log_q = teacher.compare(part, logits.log_softmax(-1))
        if self.loss == "ce":
            loss = F.nll_loss(logits.log_softmax(-1), labels, ignore_index=-1, reduction="sum")
        else:
            aim = log_p if taid is None else losses.interpolate(log_p, log_q, taid)
            loss = losses.loss_named(self.loss)(aim, log_q).sum()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return loss.detach(), losses.acceptance(log_p, log_q).sum()
