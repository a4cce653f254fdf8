"""Supervised fine-tuning as a method: cross entropy on answers, measured on held-out examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.draftmodels.finetune.arithmetic import autocast, replaced
from paceline.draftmodels.finetune.batch import Batch
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.draftmodels.finetune.held_out import held_out_loss, perplexity
from paceline.draftmodels.finetune.method import FinetuneState, Method, StepLosses
from paceline.draftmodels.finetune.objective import Objective, StepTotals
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks

#: Answers held-out prompts with the model as it is, and says how well.
Answering = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Examination:
    """What is measured on the schedule.

    Attributes:
        batches: held-out examples.
        stored: type that the weights are exported in, and are measured in.
        answering: None leaves answers to the end of the job.
    """

    batches: Sequence[Batch]
    stored: torch.dtype
    answering: Answering | None = None


class Supervised(Method[FinetuneState]):
    """Plain fine-tuning.

    Args:
        dtype: of matrix products.
    """

    def __init__(
        self, model: Decoder, examination: Examination, *, dtype: torch.dtype, ranks: Ranks = ONE_RANK
    ) -> None:
        super().__init__(model)
        self._examination, self._dtype, self._ranks = examination, dtype, ranks
        self._objective = Objective(w_ce=1.0, w_kl=0.0, w_sq=0.0, dtype=dtype)

    def backward(
        self, batches: Sequence[Batch], state: FinetuneState, steps_left: Callable[[], float]
    ) -> StepLosses:
        """See ``Method``; the loss is in nats per learnt token of the step."""
        own = [float(sum(batch.rows for batch in batches)), float(sum(len(b.learnt) for b in batches))]
        rows, learnt = map(int, self._ranks.sum(own))
        totals, loss = StepTotals(rows, learnt, torch.zeros(0)), 0.0
        head = self.model.head
        for batch in batches:
            with autocast(head.device, self._dtype):
                states = self.model(batch)
            loss += self._objective.backward(batch, states[-1:], head, None, totals).ce
        (whole,) = self._ranks.sum([loss])
        return StepLosses(rows, whole, {"learnt": learnt})

    def measure(self) -> Mapping[str, Any]:
        """Loss and perplexity of the weights as they are stored."""
        stored = self._examination.stored
        with replaced(self.parameters, lambda tensor: tensor.to(stored).to(tensor)):
            nats = held_out_loss(self.model, self._examination.batches, self._dtype)
        figures: dict[str, Any] = {
            "loss": nats,
            "perplexity": perplexity(nats),
            "n_tokens": sum(len(batch.labels) for batch in self._examination.batches),
        }
        if self._examination.answering is not None:
            figures |= self._examination.answering()
        return figures
