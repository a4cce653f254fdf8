"""A recovery job small enough for tests: a tiny student of a tiny parent, random text, everything else real.

Also a program: ``python recovery_job.py STUDENT PARENT RUN RECIPE.json [KILL_AFTER_STEP]`` trains, from the newest
checkpoint if there is one; with the last argument it kills itself (SIGKILL) right after that step. Under torchrun it is
one rank.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill_job import Shown

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.finetune.arithmetic import DTYPES
from paceline.draftmodels.finetune.decoder import Decoder, make_frozen, make_trained
from paceline.draftmodels.finetune.trainer import Parts, Trainer
from paceline.draftmodels.jobs.checkpoint import load_checkpoint
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.sparse_finetune.held_out import HeldOut
from paceline.draftmodels.sparse_finetune.masks import FixedMasks
from paceline.draftmodels.sparse_finetune.opening import open_student
from paceline.draftmodels.sparse_finetune.recipe import Recipe
from paceline.draftmodels.sparse_finetune.recovery import Recovery, RecoveryState
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config

CPU = torch.device("cpu")


def small_recipe(**changes: Any) -> Recipe:
    values = {
        "data": "text.jsonl",
        "max_steps": "8",
        "batch_tokens": 40,
        "accumulate": 2,
        "warm_up": 2,
        "lr": 3e-3,
        "dtype": "fp32",
        "eval_every": 3,
    }
    return Recipe(**{**values, **changes})


def text(count: int = 12, seed: int = 0) -> list[TokenSequence]:
    """Random text with prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    return [
        TokenSequence(tuple(torch.randint(300, (n,), generator=generator).tolist()), 1 + i % 4)
        for i, n in enumerate(lengths)
    ]


def opened_models(student: Path, parent: Path, recipe: Recipe) -> tuple[Decoder, Decoder, FixedMasks]:
    """(student, teacher, masks)."""
    opened = open_student(str(student))
    model = make_trained(
        opened.checkpoint,
        opened.config,
        CPU,
        train_embedding=recipe.train_embedding,
        checkpointing=recipe.checkpointing,
    )
    checkpoint = open_checkpoint(parent)
    config = parse_model_config(checkpoint.hf_config)
    teacher = make_frozen(checkpoint, config, CPU, DTYPES[recipe.dtype or "fp32"])
    return model, teacher, FixedMasks({n: model.get_parameter(n) for n in opened.kept}, opened.kept)


def _make_folder(folder: Path, measured: Any) -> None:
    folder.mkdir(exist_ok=True)


def make_trainer(
    student: Path,
    parent: Path,
    run: Path,
    recipe: Recipe,
    *,
    shown: Shown | None = None,
    ranks: Ranks = ONE_RANK,
    held_out: Any = None,
    export: Any = _make_folder,
) -> tuple[Trainer[RecoveryState], Recovery]:
    model, teacher, masks = opened_models(student, parent, recipe)
    dtype = DTYPES[recipe.dtype or "fp32"]
    measure = partial(HeldOut, text(3, seed=9), teacher, rows=40, dtype=dtype, answers_only=True)
    method = Recovery(recipe, model, teacher, masks, held_out or measure(), dtype=dtype, ranks=ranks)
    parts = Parts(
        sequences=text(),
        budget=recipe.budget,
        progress=shown or Shown(),
        export=export,
        threads=1,
        ranks=ranks,
    )
    run.mkdir(parents=True, exist_ok=True)
    loaded = load_checkpoint(run, RecoveryState)
    return Trainer(recipe, method, run, parts, RecoveryState(), loaded), method


def main(student: str, parent: str, run: str, recipe: str, kill_after: str = "0") -> None:
    torch.set_num_threads(1)
    kill = {int(kill_after): lambda: os.kill(os.getpid(), signal.SIGKILL)}
    ranks = Ranks.from_environment()
    trainer, _ = make_trainer(
        Path(student),
        Path(parent),
        Path(run),
        Recipe(**json.loads(recipe)),
        shown=Shown(kill),
        ranks=ranks,
    )
    trainer.train()
    if ranks.world > 1:
        flat = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
        torch.save(flat, Path(run) / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
