"""The training job, in rounds: get answers, ask the teacher once, train a pass over the latest rounds, measure.

Everything that a step does follows from (seed, round, step) and the draft's weights, so that a job that was killed goes
on with the same losses (with a budget of time, the learning rate follows the clock). Where text, teacher's rows and
measurements come from is injected; the engine, files of prompts and the command line are other modules' business.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paceline.draftmodels.distill import order
from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.distill.initialise import NewDraft
from paceline.draftmodels.distill.objective import Objective, StepFigures
from paceline.draftmodels.distill.optim import learning_rate, make_optimizer
from paceline.draftmodels.distill.parts import DraftState, Parts, with_vocab, without_vocab
from paceline.draftmodels.distill.pool import Batch, Entry, labels_among, make_batch
from paceline.draftmodels.jobs.checkpoint import Loaded, restore, save_checkpoint, training_tensors
from paceline.draftmodels.jobs.metrics import MetricsFile
from paceline.draftmodels.jobs.optim import set_rate
from paceline.draftmodels.jobs.running import RunningJob

#: Checkpoints within a round, for rounds that take longer than this.
CHECKPOINT_SECONDS = 60.0
#: Weight of the newest step in the running alpha: about the last 50 steps count.
_RUNNING = 0.02


class Trainer:
    """One job in the folder ``run``.

    Args:
        loaded: the checkpoint to go on from; None starts afresh.

    Attributes:
        parameters: what is trained, by checkpoint name.
        state: how far the job is.
    """

    def __init__(
        self,
        recipe: Recipe,
        new: NewDraft,
        run: Path,
        parts: Parts,
        loaded: Loaded[DraftState] | None = None,
    ) -> None:
        self._recipe, self._new, self._run, self._parts = recipe, new, run, parts
        self._device = torch.device(recipe.device)
        self._draft = new.draft.to(self._device)
        self.parameters = self._draft.trained()
        self._optimizer = make_optimizer(self.parameters, recipe)
        self._dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self._objective = Objective(
            recipe.loss, recipe.loss_temperature, recipe.step_weights(self._draft.steps), self._dtype
        )
        self._label_of = labels_among(new.vocab_ids, self._draft.config.vocab_size, self._device)
        self.state = DraftState() if loaded is None else loaded.state
        if loaded is not None:
            restore(without_vocab(loaded)[0], self.parameters, self._optimizer)
        self._metrics = MetricsFile(run / "metrics.jsonl", enabled=parts.ranks.is_main)
        self._metrics.rewind(-1 if loaded is None else self.state.step)
        self._rounds: dict[int, list[Entry]] = {}
        self._job = RunningJob(self.state, recipe.budget, parts.ranks, parts.clock, parts.started)

    def train(self) -> DraftState:
        """Work until the budget is used, patience is at its end, or Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint has been written.
        """
        if self.state.step == 0:
            self._measure()
            self._save()
        while not self._stop():
            self._train_round()
        if self._job.interrupted:
            raise KeyboardInterrupt
        if not self.state.measured or self.state.measured[-1]["step"] != self.state.step:
            self._measure()
            self._save()
        return self.state

    # ---- rounds

    def _train_round(self) -> None:
        pool = self._pool(self.state.round)
        rows = [len(entry.sequence.tokens) - 1 for entry in pool]
        batches = order.batches(rows, self._recipe.batch_tokens, self.state.round, self._recipe.seed)
        with self._job.training(self._parts.threads):
            for batch in batches[self.state.round_step :]:
                self._step([pool[i] for i in self._parts.ranks.mine(batch)])
                if self._stop():
                    self._save()
                    return
                if self._job.seconds_since_save() > CHECKPOINT_SECONDS:
                    self._save()
        self.state.round += 1
        self.state.round_step = 0
        if self.state.round % self._recipe.eval_rounds == 0:
            self._measure()
        self._save()

    def _pool(self, round_: int) -> list[Entry]:
        """The entries of the latest ``reuse`` rounds, oldest first."""
        rounds = range(max(0, round_ - self._recipe.reuse + 1), round_ + 1)
        self._rounds = {r: self._rounds.get(r) or self._fetch(r) for r in rounds}
        return [entry for r in rounds for entry in self._rounds[r]]

    def _fetch(self, round_: int) -> list[Entry]:
        ranks, sequences = self._parts.ranks, []
        if ranks.is_main:
            self._parts.progress.note(f"round {round_}: answers")
            sequences = list(self._parts.text.sequences(round_, self._current_draft()))
        sequences = ranks.from_main(sequences)
        mine = ranks.mine(range(len(sequences)))
        self._parts.progress.note(f"round {round_}: teacher")
        rows = dict(zip(mine, self._parts.teacher.rows([sequences[i] for i in mine]), strict=True))
        return [Entry(sequence, rows.get(i)) for i, sequence in enumerate(sequences)]

    def _current_draft(self) -> Path | None:
        if not self._recipe.from_draft:
            return None
        self._parts.export(self._run / "current", ())
        return self._run / "current"

    # ---- steps

    def _step(self, entries: Sequence[Entry]) -> None:
        state, recipe = self.state, self._recipe
        used = self._job.used()
        set_rate(self._optimizer, learning_rate(recipe, used))
        self._optimizer.zero_grad(set_to_none=True)
        batch = self._batch(entries) if entries else None
        totals = self._totals(batch)
        figures = (
            self._forward_backward(batch, totals, used)
            if batch
            else [StepFigures(0, 0, 0.0, 0.0)] * len(totals)
        )
        self._parts.ranks.sum_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.grad_clip)
        self._optimizer.step()
        skipped = 0 if batch is None else int((batch.labels < 0).sum())
        state.step += 1
        state.round_step += 1
        state.tokens += totals[0]
        self._record(figures, float(norm), skipped if recipe.loss == "ce" else 0)

    def _batch(self, entries: Sequence[Entry]) -> Batch:
        return make_batch(entries, self._device, self._label_of, with_states=self._draft.reads_state)

    def _totals(self, batch: Batch | None) -> list[int]:
        """Rows with a loss of each unrolled step, over all ranks."""
        steps = range(1, self._draft.steps + 1)
        if batch is None:
            own = [0.0 for _ in steps]
        else:
            rows = [batch.layout.step_rows(step) for step in steps]
            own = [float(self._objective.rows_with_loss(r, batch.labels)) for r in rows]
        return [int(total) for total in self._parts.ranks.sum(own)]

    def _forward_backward(self, batch: Batch, totals: Sequence[int], used: float) -> list[StepFigures]:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not torch.float32):
            outputs = self._draft(batch.layout, batch.states)
        rows = [batch.layout.step_rows(step) for step in range(1, self._draft.steps + 1)]
        start = self._recipe.taid
        taid = None if start is None else start + (1 - start) * min(used, 1.0)
        return self._objective.backward(
            outputs, self._draft.head, batch.teacher, rows, batch.labels, totals=totals, taid=taid
        )

    def _record(self, figures: Sequence[StepFigures], norm: float, skipped: int) -> None:
        state = self.state
        flat = [value for f in figures for value in (f.rows, f.alpha_rows, f.loss, f.alpha)] + [skipped]
        *summed, skipped_sum = self._parts.ranks.sum(flat)
        parts = [summed[i : i + 4] for i in range(0, len(summed), 4)]
        losses = [loss / max(rows, 1) for rows, _, loss, _ in parts]
        alphas = [alpha / max(rows, 1) for _, rows, _, alpha in parts]
        state.labels_outside += int(skipped_sum)
        previous = state.running_alpha or alphas
        state.running_alpha = [
            old + _RUNNING * (new - old) for old, new in zip(previous, alphas, strict=True)
        ]
        self._job.count_time()
        weights = self._objective.step_weights
        line = {
            "step": state.step,
            "round": state.round,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "loss": sum(w * loss for w, loss in zip(weights, losses, strict=True)),
            "losses": losses,
            "alphas": alphas,
            "lr": self._optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
        }
        self._metrics.add(line)
        self._parts.progress.step(state, line, self._job.seconds_left())

    # ---- between steps

    def _measure(self) -> None:
        """Export, measure through the engine on the main rank, keep the best."""
        figures: dict[str, Any] = {}
        if self._parts.ranks.is_main:
            self._parts.progress.note("measuring")
            current = self._run / "current"
            self._parts.export(current, ())
            figures = dict(self._parts.judge.measure(current))
        self._job.count_time()
        state = self.state
        figures = self._parts.ranks.from_main(figures)
        figures |= {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
        state.measured.append(figures)
        better = state.best_tau is None or figures["tau"] > state.best_tau
        if better:
            state.best_tau = figures["tau"]
        if self._parts.ranks.is_main:
            self._metrics.add({"measured": figures, "step": state.step})
            if better:
                self._parts.export(self._run / "best", (figures,))

    def _save(self) -> None:
        self._job.count_time()
        if self._parts.ranks.is_main:
            tensors = training_tensors(self.parameters, self._optimizer)
            save_checkpoint(self._run, self.state, with_vocab(tensors, self._new.vocab_ids))
        self._job.saved()

    def _stop(self) -> bool:
        taus = [figures["tau"] for figures in self.state.measured]
        return self._job.stop(exhausted=self._recipe.stopping.exhausted(taus))
