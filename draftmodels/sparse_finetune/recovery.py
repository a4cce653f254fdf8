"""Recovery as a method of fine-tuning: the fixed mask, the dense parent as teacher, and steps through the rounding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.finetune.arithmetic import autocast
from paceline.draftmodels.finetune.batch import Batch
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.draftmodels.finetune.method import FinetuneState, Method, StepLosses
from paceline.draftmodels.finetune.objective import Figures, Objective, StepTotals, Teaching
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.sparse_finetune.held_out import HeldOut
from paceline.draftmodels.sparse_finetune.masks import FixedMasks
from paceline.draftmodels.sparse_finetune.recipe import Recipe


@dataclass
class RecoveryState(FinetuneState):
    """How far a job is.

    Attributes:
        rounded_from: the first step that was trained through the rounding to int8, None before.
    """

    rounded_from: int | None = None


class Recovery(Method[RecoveryState]):
    """Fine-tuning of a sparse student.

    Args:
        dtype: of matrix products.

    Attributes:
        held_out: measures the student.
        masks: of its sparse linears.
        teacher: frozen.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Decoder,
        teacher: Decoder,
        masks: FixedMasks,
        held_out: HeldOut,
        *,
        dtype: torch.dtype,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__(student)
        self._recipe, self._dtype, self._ranks = recipe, dtype, ranks
        self.teacher = teacher
        self.masks, self.held_out = masks, held_out
        self._device = student.head.device
        self._objective = Objective(recipe.w_ce, recipe.w_kl, recipe.w_sq, dtype)

    def backward(
        self, batches: Sequence[Batch], state: RecoveryState, steps_left: Callable[[], float]
    ) -> StepLosses:
        """See ``Method``."""
        teaching = [self._asked(batch) for batch in batches]
        totals = self._totals(batches, teaching)
        figures = Figures()
        with self.masks.rounded() if self._rounds(state, steps_left) else nullcontext():
            for batch, own in zip(batches, teaching, strict=True):
                with autocast(self._device, self._dtype):
                    states = self.model(batch)
                figures += self._objective.backward(batch, states, self.model.head, own, totals)
        return self._losses(figures, totals, rounded=state.rounded_from is not None)

    def measure(self) -> Mapping[str, Any]:
        """See ``Method``; rounded to int8 if that is how it is exported."""
        with self.masks.rounded() if self._recipe.quantize else nullcontext():
            return asdict(self.held_out.measure(self.model))

    def settle_gradients(self) -> None:
        """Zero those of pruned weights."""
        self.masks.mask_gradients()

    def settle_weights(self) -> None:
        """Zero the pruned weights."""
        self.masks.apply()

    def packed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without what is pruned."""
        return self.masks.packed(tensors)

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``Method``."""
        return self.masks.unpacked(tensors)

    def _asked(self, batch: Batch) -> Teaching | None:
        """The teacher's view of a batch, as far as the loss needs it."""
        if not self._recipe.needs_teacher:
            return None
        with torch.no_grad(), autocast(self._device, self._dtype):
            states = self.teacher(batch)
        return Teaching(states if self._recipe.w_sq else states[-1:], self.teacher.head)

    def _totals(self, batches: Sequence[Batch], teaching: Sequence[Teaching | None]) -> StepTotals:
        """Over all forwards and ranks."""
        layers = self.model.config.num_layers if self._recipe.w_sq else 0
        squares = torch.zeros(layers, dtype=torch.float64)
        for own in teaching if layers else ():
            assert own is not None
            squares += torch.stack([states.square().sum(dtype=torch.float64) for states in own.states]).cpu()
        counts = [float(sum(batch.rows for batch in batches)), float(sum(len(b.learnt) for b in batches))]
        rows, learnt, *summed = self._ranks.sum([*counts, *squares.tolist()])
        elements = rows * self.model.config.hidden_size
        mean_squares = torch.tensor(summed, dtype=torch.float64, device=self._device) / elements
        return StepTotals(int(rows), int(learnt), mean_squares)

    def _rounds(self, state: RecoveryState, steps_left: Callable[[], float]) -> bool:
        """Whether this step is trained through the rounding: once it is, all later ones are."""
        last = self._recipe.qat_steps
        if last and state.rounded_from is None and steps_left() <= last:
            state.rounded_from = state.step
        return state.rounded_from is not None

    def _losses(self, figures: Figures, totals: StepTotals, *, rounded: bool) -> StepLosses:
        recipe = self._recipe
        whole = Figures(*self._ranks.sum([figures.ce, figures.kl, figures.sq]))
        known = {"ce": recipe.w_ce + recipe.w_kl, "kl": recipe.w_kl, "sq": recipe.w_sq}
        parts = {name: value for name, value in asdict(whole).items() if known[name]}
        return StepLosses(totals.rows, self._objective.loss(whole), {**parts, "rounded": rounded})
