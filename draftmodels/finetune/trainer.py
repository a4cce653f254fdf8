"""The loop of fine-tuning jobs: step by step, measured on held-out text on a schedule, the best kept.

Everything that a step does follows from (seed, epoch, step) and the weights, so that a job that was killed goes on with
the same losses (with a budget of time, the learning rate follows the clock). How gradients are made is the ``Method``'s
business; where text comes from and what becomes of the model is injected.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill import order
from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.finetune.method import Method, State, StepLosses
from paceline.draftmodels.finetune.recipe import FinetuneRecipe
from paceline.draftmodels.jobs.budget import Budget
from paceline.draftmodels.jobs.checkpoint import Loaded, restore, save_checkpoint, training_tensors
from paceline.draftmodels.jobs.metrics import MetricsFile
from paceline.draftmodels.jobs.optim import adamw, set_rate
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.jobs.running import RunningJob
from paceline.draftmodels.jobs.show import Progress
from paceline.server.errors import DataError

#: A checkpoint of a 135M model is 0.6 to 1.6 GB: written this often beside the measurements.
CHECKPOINT_SECONDS = 180.0
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Parts:
    """What a trainer works with.

    Attributes:
        sequences: to train on.
        export: writes the model as it is to a folder, with measured figures.
        threads: for torch while it trains.
        started: when the job began, on ``clock``.
    """

    sequences: Sequence[TokenSequence]
    budget: Budget
    progress: Progress
    export: Callable[[Path, Sequence[Mapping[str, Any]]], None]
    threads: int
    ranks: Ranks = ONE_RANK
    clock: Callable[[], float] = time.monotonic
    started: float | None = None


class Trainer(Generic[State]):
    """One job in the folder ``run``.

    Args:
        state: of a new job.
        loaded: the checkpoint to go on from; None starts afresh.

    Attributes:
        parameters: what is trained, by checkpoint name.
        optimizer: AdamW over them.
        state: how far the job is.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        method: Method[State],
        run: Path,
        parts: Parts,
        state: State,
        loaded: Loaded[State] | None = None,
    ) -> None:
        self._recipe, self._method, self._run, self._parts = recipe, method, run, parts
        self._device = method.model.head.device
        self.parameters = method.parameters
        self.optimizer = adamw(self.parameters, lr=recipe.lr, betas=_BETAS, weight_decay=recipe.weight_decay)
        self.state = state if loaded is None else loaded.state
        if loaded is not None:
            restore(method.unpacked(loaded.tensors), self.parameters, self.optimizer)
        self._metrics = MetricsFile(run / "metrics.jsonl", enabled=parts.ranks.is_main)
        self._metrics.rewind(-1 if loaded is None else self.state.step)
        self._job = RunningJob(self.state, parts.budget, parts.ranks, parts.clock, parts.started)

    def train(self) -> State:
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
        state, recipe, method = self.state, self._recipe, self._method
        set_rate(self.optimizer, recipe.rate(state.step, self._job.used()))
        self.optimizer.zero_grad(set_to_none=True)
        batches = [
            make_batch(group, self._device, answers_only=recipe.learn == "answers")
            for group in grouped(sequences, recipe.batch_tokens)
        ]
        losses = method.backward(batches, state, lambda: self._job.steps_left(recipe.step_tokens))
        self._parts.ranks.sum_gradients(self.parameters.values())
        method.settle_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.grad_clip))
        if not math.isfinite(norm):
            raise DataError(
                f"step {state.step + 1}: gradients are no numbers any more; start again with a lower --lr"
            )
        self.optimizer.step()
        method.settle_weights()
        state.step += 1
        state.round_step += 1
        state.tokens += losses.rows
        self._record(losses, norm)

    def _record(self, losses: StepLosses, norm: float) -> None:
        state = self.state
        self._job.count_time()
        line = {
            "step": state.step,
            "epoch": state.round,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "loss": losses.loss,
            **losses.parts,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
        }
        self._metrics.add(line)
        self._parts.progress.step(state, line, self._job.seconds_left())

    # ---- between steps

    def _measure(self) -> None:
        """Look at the model as it would be exported, on the main rank; keep the best."""
        figures: dict[str, Any] = {}
        if self._parts.ranks.is_main:
            self._parts.progress.note("measuring")
            figures = dict(self._method.measure())
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
            save_checkpoint(self._run, self.state, self._method.packed(tensors))
        self._job.saved()

    def _stop(self) -> bool:
        scores = [-math.log(figures["perplexity"]) for figures in self.state.measured]
        return self._job.stop(exhausted=self._recipe.stopping.exhausted(scores))
