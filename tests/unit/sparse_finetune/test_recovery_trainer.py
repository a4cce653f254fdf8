"""The job: the same losses after a kill, from one process or two; budgets, patience, Ctrl-C and what is kept."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import recovery_job
import torch
from distill_job import Shown
from recovery_job import make_trainer, small_recipe

from paceline.draftmodels.jobs.checkpoint import load_checkpoint
from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.sparse_finetune.held_out import Quality
from paceline.draftmodels.sparse_finetune.recovery import RecoveryState
from paceline.server.errors import DataError

PROGRAM = Path(recovery_job.__file__)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}


def program(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(PROGRAM), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


class Measuring:
    """Perplexities from a list, the last one for ever."""

    def __init__(self, *perplexities: float) -> None:
        self._perplexities, self.calls = perplexities, 0

    def measure(self, student: Any) -> Quality:
        perplexity = self._perplexities[min(self.calls, len(self._perplexities) - 1)]
        self.calls += 1
        return Quality(perplexity, 5.0, 0.1, 0.5, 10)


def test_losses_fall(student: Path, parent: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(student, parent, tmp_path / "run", small_recipe(max_steps="30", accumulate=4))
    state = trainer.train()
    found = losses(tmp_path / "run")
    first, last = ([found[i] for i in range(a, a + 5)] for a in (1, 26))
    assert sum(last) < 0.8 * sum(first)
    assert [m["step"] for m in state.measured] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]


def test_a_killed_job_goes_on_with_the_losses_of_an_uninterrupted_one(
    student: Path, parent: Path, tmp_path: Path
) -> None:
    recipe = json.dumps(asdict(small_recipe(qat_steps=5, w_kl=0.5)))
    # All in programs of the same kind: how a process set up its arithmetic is in the last bits.
    assert program(student, parent, tmp_path / "whole", recipe).returncode == 0
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 9))
    done = program(student, parent, tmp_path / "killed", recipe, 5)  # two steps after the last checkpoint
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert max(losses(tmp_path / "killed")) >= 4
    done = program(student, parent, tmp_path / "killed", recipe)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == whole
    ours, theirs = (load_checkpoint(tmp_path / name, RecoveryState) for name in ("whole", "killed"))
    assert ours is not None
    assert theirs is not None
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    for quality in ("perplexity", "kl"):
        assert [m[quality] for m in ours.state.measured] == [m[quality] for m in theirs.state.measured]
    assert ours.state.tokens == theirs.state.tokens > 0
    assert ours.state.rounded_from == theirs.state.rounded_from == 3


def test_two_ranks_train_what_one_process_trains(student: Path, parent: Path, tmp_path: Path) -> None:
    recipe = small_recipe(max_steps="5", w_kl=0.5)
    make_trainer(student, parent, tmp_path / "one", recipe)[0].train()
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")
    arguments = (student, parent, tmp_path / "two", json.dumps(asdict(recipe)))
    done = program(*arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-4)
    ranks = [torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*ranks)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint(student: Path, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = Shown({2: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        make_trainer(student, parent, run, small_recipe(), shown=shown)[0].train()
    loaded = load_checkpoint(run, RecoveryState)
    assert loaded is not None
    assert loaded.state.step == 2
    make_trainer(student, parent, run, small_recipe())[0].train()
    make_trainer(student, parent, tmp_path / "whole", small_recipe())[0].train()
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.usefixtures("interruptible")
def test_a_job_that_was_stopped_at_its_last_step_is_measured_when_resumed(
    student: Path, parent: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", small_recipe(max_steps="4")
    shown = Shown({4: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        make_trainer(student, parent, run, recipe, shown=shown)[0].train()
    state = make_trainer(student, parent, run, recipe)[0].train()
    assert state.step == 4
    assert [m["step"] for m in state.measured] == [0, 3, 4]


def test_budgets_end_the_job(student: Path, parent: Path, tmp_path: Path) -> None:
    def done(name: str, **changes: Any) -> RecoveryState:
        return make_trainer(student, parent, tmp_path / name, small_recipe(**changes))[0].train()

    assert done("steps", max_steps="3").step == 3
    by_tokens = done("tokens", max_steps=None, max_tokens="200")
    assert 200 <= by_tokens.tokens < 200 + 100
    assert done("time", max_steps="1000", max_time="0.1s").step < 1000
    assert small_recipe(max_steps=None).budget.tokens == 300_000


def test_the_best_by_perplexity_is_kept_and_patience_stops(
    student: Path, parent: Path, tmp_path: Path
) -> None:
    written: list[tuple[str, Any]] = []
    trainer, _ = make_trainer(
        student,
        parent,
        tmp_path / "run",
        small_recipe(max_steps="1000", eval_every=1, patience=2),
        held_out=Measuring(20.0, 10.0, 11.0, 12.0, 5.0),
        export=lambda folder, measured: written.append(
            (folder.name, tuple(m["perplexity"] for m in measured))
        ),
    )
    state = trainer.train()
    assert [figures["perplexity"] for figures in state.measured] == [20.0, 10.0, 11.0, 12.0]
    assert written == [("best", (20.0,)), ("best", (10.0,))]
    assert state.best_perplexity == 10.0


def test_the_last_steps_are_trained_through_the_rounding(student: Path, parent: Path, tmp_path: Path) -> None:
    for name, limit in (("steps", {"max_steps": "8"}), ("tokens", {"max_steps": None, "max_tokens": "640"})):
        trainer, _ = make_trainer(student, parent, tmp_path / name, small_recipe(qat_steps=3, **limit))
        trainer.train()
        lines = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        rounded = [line["rounded"] for line in lines]
        assert rounded == sorted(rounded)
        assert rounded.count(True) == 3 if name == "steps" else 2 <= rounded.count(True) <= 4
    exact, _ = make_trainer(student, parent, tmp_path / "exact", small_recipe())
    exact.train()
    before, after = losses(tmp_path / "exact"), losses(tmp_path / "steps")
    assert [before[i] == after[i] for i in range(1, 9)] == [True] * 5 + [False] * 3


def test_what_is_measured_is_what_would_be_exported(student: Path, parent: Path, tmp_path: Path) -> None:
    found = {}
    for quantize in ("int8", None):
        recipe = small_recipe(quantize=quantize, max_steps="1")
        trainer, method = make_trainer(student, parent, tmp_path / str(quantize), recipe)
        found[quantize] = trainer.train().measured[-1]["perplexity"]
        exact = method.held_out.measure(method.model).perplexity
        with method.masks.rounded():
            rounded = method.held_out.measure(method.model).perplexity
        assert found[quantize] == (rounded if quantize else exact)
        assert rounded != exact


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    recipe = small_recipe(lr=1.0, warm_up=4)
    assert [recipe.rate(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert recipe.rate(10, 0.75) == 0.25
    assert recipe.rate(10, 1.2) == 0.0
    assert small_recipe(lr=1.0, warm_up=0).rate(0, 0.0) == 1.0


def test_bf16_trains_about_the_same(student: Path, parent: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        make_trainer(student, parent, tmp_path / dtype, small_recipe(dtype=dtype, max_steps="5"))[0].train()
    narrow, wide = (list(losses(tmp_path / dtype).values()) for dtype in ("bf16", "fp32"))
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.05)


def test_a_rate_that_blows_up_is_one_clear_line(student: Path, parent: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(student, parent, tmp_path / "run", small_recipe())
    with torch.no_grad():
        trainer.parameters["model.norm.weight"].fill_(float("inf"))
    with pytest.raises(DataError, match="lower --lr"):
        trainer._step(recovery_job.text(2))
