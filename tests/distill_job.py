"""A training job small enough for tests: a tiny target, text and teacher that need no engine, a fixed measurement.

Also a program: ``python distill_job.py TARGET RUN RECIPE.json [KILL_AFTER_STEP]`` trains, from the newest checkpoint if
there is one; with the last argument it kills itself (SIGKILL) right after that step. Under torchrun it is one rank.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.distill.initialise import new_draft
from paceline.draftmodels.distill.layout import Tokens
from paceline.draftmodels.distill.parts import DraftState, Parts
from paceline.draftmodels.distill.trainer import Trainer
from paceline.draftmodels.jobs.checkpoint import JobState, load_checkpoint
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.teacher import TeacherRows
from paceline.server.models.checkpoint import open_checkpoint

VOCAB_IDS = torch.arange(0, 300, 2, dtype=torch.int32)


class Text:
    """Rounds of random text, a function of the round."""

    def __init__(self) -> None:
        self.drafts: list[Path | None] = []

    def sequences(self, round_: int, draft: Path | None) -> list[TokenSequence]:
        self.drafts.append(draft)
        generator = torch.Generator().manual_seed(round_)
        lengths = torch.randint(6, 14, (6,), generator=generator).tolist()
        return [
            TokenSequence(tuple(torch.randint(300, (n,), generator=generator).tolist()), 3) for n in lengths
        ]


class Teaching:
    """A fixed random model in the target's place: states are looked up by token, and distributions made of them."""

    def __init__(self, hidden: int, ids: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(9)
        self._states = torch.randn(300, hidden, generator=generator)
        self._head = torch.randn(300, hidden, generator=generator)
        self._ids = torch.arange(300) if ids is None else ids.long()

    def rows(self, sequences: Sequence[Tokens]) -> list[TeacherRows]:
        return [self._row(sequence) for sequence in sequences]

    def _row(self, sequence: Tokens) -> TeacherRows:
        states = self._states[torch.tensor(sequence.tokens)]
        answers = states[sequence.prompt_tokens - 1 : -1]
        return TeacherRows(states, (0.4 * answers @ self._head.T).log_softmax(-1)[:, self._ids])


class Measuring:
    """tau from a list, the last value for ever."""

    def __init__(self, taus: Sequence[float] = (1.5,)) -> None:
        self._taus, self.calls = list(taus), 0

    def measure(self, draft: Path) -> Mapping[str, Any]:
        tau = self._taus[min(self.calls, len(self._taus) - 1)]
        self.calls += 1
        return {"tau": tau, "alpha_per_position": [0.5, 0.25]}


class Shown:
    """Keeps losses by step; may do something after one."""

    def __init__(self, after: Mapping[int, Any] | None = None) -> None:
        self.losses: dict[int, float] = {}
        self._after = after or {}

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        self.losses[state.step] = figures["loss"]
        self._after.get(state.step, lambda: None)()

    def note(self, text: str) -> None:
        """Not looked at."""


def make_trainer(
    target: Path,
    run: Path,
    recipe: Recipe,
    *,
    shown: Shown | None = None,
    ids: Tensor | None = VOCAB_IDS,
    judge: Measuring | None = None,
    text: Text | None = None,
    ranks: Ranks = ONE_RANK,
    export: Any = lambda folder, measured: folder.mkdir(exist_ok=True),
) -> Trainer:
    checkpoint = open_checkpoint(target)
    new = new_draft(recipe, checkpoint, ids)
    parts = Parts(
        text=text or Text(),
        teacher=Teaching(int(checkpoint.hf_config["hidden_size"]), ids),
        judge=judge or Measuring(),
        progress=shown or Shown(),
        export=export,
        threads=1,
        ranks=ranks,
    )
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(recipe, new, run, parts, load_checkpoint(run, DraftState))


def small_recipe(**changes: Any) -> Recipe:
    values = {
        "init": "feature",
        "draft_vocab": len(VOCAB_IDS),
        "max_steps": "9",
        "batch_tokens": 24,
        "lr": 3e-3,
        "precision": "fp32",
        "eval_rounds": 2,
    }
    return Recipe(**{**values, **changes})


def main(target: str, run: str, recipe: str, kill_after: str = "0") -> None:
    torch.set_num_threads(1)
    kill = {int(kill_after): lambda: os.kill(os.getpid(), signal.SIGKILL)}
    ranks = Ranks.from_environment()
    trainer = make_trainer(
        Path(target), Path(run), Recipe(**json.loads(recipe)), shown=Shown(kill), ranks=ranks
    )
    trainer.train()
    if ranks.world > 1:
        flat = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
        torch.save(flat, Path(run) / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
