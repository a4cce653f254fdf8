"""The recovery job: step by step under the fixed mask, measured on held-out text on a schedule, the best kept.

Everything that a step does follows from (seed, epoch, step) and the weights, so that a job that was killed goes on with
the same losses (with a budget of time, the learning rate follows the clock). Where weights and text come from and what
becomes of the student is injected.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill import order
from paceline.draftmodels.jobs.checkpoint import (
    JobState,
    Loaded,
    restore,
    save_checkpoint,
    training_tensors,
)
from paceline.draftmodels.jobs.metrics import MetricsFile
from paceline.draftmodels.jobs.optim import adamw, set_rate
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.jobs.running import RunningJob
from paceline.draftmodels.jobs.show import Progress
from paceline.draftmodels.sparse_finetune.batch import Batch, grouped, make_batch
from paceline.draftmodels.sparse_finetune.decoder import Decoder
from paceline.draftmodels.sparse_finetune.held_out import HeldOut
from paceline.draftmodels.sparse_finetune.masks import FixedMasks
from paceline.draftmodels.sparse_finetune.objective import Figures, Objective, StepTotals, Teaching
from paceline.draftmodels.sparse_finetune.recipe import Recipe
from paceline.server.errors import DataError

#: A checkpoint of a 135M student is 0.6 GB: written this often beside the measurements.
CHECKPOINT_SECONDS = 180.0
_BETAS = (0.9, 0.999)


@dataclass
class RecoveryState(JobState):
    """How far a job is.

    Attributes:
        best_perplexity: the best measured so far.
        rounded_from: the first step that was trained through the rounding to int8, None before.
    """

    best_perplexity: float | None = None
    rounded_from: int | None = None


@dataclass(frozen=True)
class Parts:
    """What a trainer works with.

    Attributes:
        sequences: to train on.
        held_out: measures the student.
        export: writes the student as it is to a folder, with measured figures.
        threads: for torch while it trains.
        started: when the job began, on ``clock``.
    """

    student: Decoder
    teacher: Decoder
    masks: FixedMasks
    sequences: Sequence[TokenSequence]
    held_out: HeldOut
    progress: Progress
    export: Callable[[Path, Sequence[Mapping[str, Any]]], None]
    dtype: torch.dtype
    threads: int
    ranks: Ranks = ONE_RANK
    clock: Callable[[], float] = time.monotonic
    started: float | None = None


class Trainer:
    """One job in the folder ``run``.

    Args:
        loaded: the checkpoint to go on from; None starts afresh.

    Attributes:
        parameters: what is trained, by checkpoint name.
        optimizer: AdamW over them.
        state: how far the job is.
    """

    def __init__(
        self, recipe: Recipe, run: Path, parts: Parts, loaded: Loaded[RecoveryState] | None = None
    ) -> None:
        self._recipe, self._run, self._parts = recipe, run, parts
        self._device = parts.student.head.device
        self.parameters = parts.student.trained()
        self.optimizer = adamw(self.parameters, lr=recipe.lr, betas=_BETAS, weight_decay=recipe.weight_decay)
        self._objective = Objective(recipe.w_ce, recipe.w_kl, recipe.w_sq, parts.dtype)
        self.state = RecoveryState() if loaded is None else loaded.state
        if loaded is not None:
            restore(parts.masks.unpacked(loaded.tensors), self.parameters, self.optimizer)
        self._metrics = MetricsFile(run / "metrics.jsonl", enabled=parts.ranks.is_main)
        self._metrics.rewind(-1 if loaded is None else self.state.step)
        self._job = RunningJob(self.state, recipe.budget, parts.ranks, parts.clock, parts.started)

    def train(self) -> RecoveryState:
        """Work until the budget is used, patience is at its end, or Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint has been written.
            DataError: gradients are no numbers any more.
        """
        with self._job.training(self._parts.threads):
            if self.state.step == 0:
                self._measure()
                self._save()
            while not self._stop():
                self._train_epoch()
            if not self._job.interrupted and self.state.measured[-1]["step"] != self.state.step:
                self._measure()
                self._save()
        if self._job.interrupted:
            raise KeyboardInterrupt
        return self.state

    def _train_epoch(self) -> None:
        state, recipe = self.state, self._recipe
        lengths = [len(sequence.tokens) for sequence in self._parts.sequences]
        batches = order.batches(lengths, recipe.step_tokens, state.round, recipe.seed)
        for batch in batches[state.round_step :]:
            self._step([self._parts.sequences[i] for i in self._parts.ranks.mine(batch)])
            if state.step % recipe.eval_every == 0:
                self._measure()
                self._save()
            over = self._stop()
            if self._job.interrupted or self._job.seconds_since_save() > CHECKPOINT_SECONDS:
                self._save()
            if over:
                return
        state.round += 1
        state.round_step = 0

    # ---- steps

    def _step(self, sequences: Sequence[TokenSequence]) -> None:
        state, recipe, parts = self.state, self._recipe, self._parts
        used = self._job.used()
        set_rate(self.optimizer, recipe.rate(state.step, used))
        self.optimizer.zero_grad(set_to_none=True)
        batches = [
            make_batch(group, self._device, answers_only=recipe.learn == "answers")
            for group in grouped(sequences, recipe.batch_tokens)
        ]
        teaching = [self._asked(batch) for batch in batches]
        totals = self._totals(batches, teaching)
        figures = Figures()
        with parts.masks.rounded() if self._rounds() else nullcontext():
            for batch, own in zip(batches, teaching, strict=True):
                with self._autocast():
                    states = parts.student(batch)
                figures += self._objective.backward(batch, states, parts.student.head, own, totals)
        parts.ranks.sum_gradients(self.parameters.values())
        parts.masks.mask_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.grad_clip))
        if not math.isfinite(norm):
            raise DataError(
                f"step {state.step + 1}: gradients are no numbers any more; start again with a lower --lr"
            )
        self.optimizer.step()
        parts.masks.apply()
        state.step += 1
        state.round_step += 1
        state.tokens += totals.rows
        self._record(figures, norm)

    def _asked(self, batch: Batch) -> Teaching | None:
        """The teacher's view of a batch, as far as the loss needs it."""
        if not self._recipe.needs_teacher:
            return None
        with torch.no_grad(), self._autocast():
            states = self._parts.teacher(batch)
        return Teaching(states if self._recipe.w_sq else states[-1:], self._parts.teacher.head)

    def _totals(self, batches: Sequence[Batch], teaching: Sequence[Teaching | None]) -> StepTotals:
        """Over all forwards and ranks."""
        layers = self._parts.student.config.num_layers if self._recipe.w_sq else 0
        squares = torch.zeros(layers, dtype=torch.float64)
        for own in teaching if layers else ():
            assert own is not None
            squares += torch.stack([states.square().sum(dtype=torch.float64) for states in own.states]).cpu()
        counts = [float(sum(batch.rows for batch in batches)), float(sum(len(b.learnt) for b in batches))]
        rows, learnt, *summed = self._parts.ranks.sum([*counts, *squares.tolist()])
        elements = rows * self._parts.student.config.hidden_size
        mean_squares = torch.tensor(summed, dtype=torch.float64, device=self._device) / elements
        return StepTotals(int(rows), int(learnt), mean_squares)

    def _rounds(self) -> bool:
        """Whether this step is trained through the rounding: once it is, all later ones are."""
        state, last = self.state, self._recipe.qat_steps
        if last and state.rounded_from is None and self._job.steps_left(self._recipe.step_tokens) <= last:
            state.rounded_from = state.step
        return state.rounded_from is not None

    def _record(self, figures: Figures, norm: float) -> None:
        state = self.state
        whole = Figures(*self._parts.ranks.sum([figures.ce, figures.kl, figures.sq]))
        self._job.count_time()
        recipe = self._recipe
        known = {"ce": recipe.w_ce + recipe.w_kl, "kl": recipe.w_kl, "sq": recipe.w_sq}
        line = {
            "step": state.step,
            "epoch": state.round,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "loss": self._objective.loss(whole),
            **{name: value for name, value in asdict(whole).items() if known[name]},
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "rounded": state.rounded_from is not None,
        }
        self._metrics.add(line)
        self._parts.progress.step(state, line, self._job.seconds_left())

    def _autocast(self) -> Any:
        dtype = self._parts.dtype
        return torch.autocast(self._device.type, dtype, enabled=dtype is not torch.float32)

    # ---- between steps

    def _measure(self) -> None:
        """Look at the student as it would be exported, on the main rank; keep the best."""
        figures: dict[str, Any] = {}
        if self._parts.ranks.is_main:
            self._parts.progress.note("measuring")
            with self._parts.masks.rounded() if self._recipe.quantize else nullcontext():
                figures = asdict(self._parts.held_out.measure(self._parts.student))
        self._job.count_time()
        state = self.state
        figures = self._parts.ranks.from_main(figures)
        figures |= {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
        state.measured.append(figures)
        better = state.best_perplexity is None or figures["perplexity"] < state.best_perplexity
        if better:
            state.best_perplexity = figures["perplexity"]
        if self._parts.ranks.is_main:
            self._metrics.add({"measured": figures, "step": state.step})
            if better:
                self._parts.export(self._run / "best", (figures,))

    def _save(self) -> None:
        self._job.count_time()
        if self._parts.ranks.is_main:
            tensors = training_tensors(self.parameters, self.optimizer)
            save_checkpoint(self._run, self.state, self._parts.masks.packed(tensors))
        self._job.saved()

    def _stop(self) -> bool:
        scores = [-math.log(figures["perplexity"]) for figures in self.state.measured]
        return self._job.stop(exhausted=self._recipe.stopping.exhausted(scores))
