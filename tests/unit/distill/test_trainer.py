"""The job: the same losses after a kill, from one process or two; budgets, patience, Ctrl-C and what is kept."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distill_job
import pytest
import torch
from distill_job import Measuring, Shown, Text, make_trainer, small_recipe

from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.distill.parts import DraftState
from paceline.draftmodels.jobs.checkpoint import load_checkpoint
from paceline.draftmodels.jobs.metrics import read_metrics

PROGRAM = Path(distill_job.__file__)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}


def program(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(PROGRAM), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("init", ["feature", "layers:1"])
def test_losses_fall(tiny_checkpoint: Any, tmp_path: Path, init: str) -> None:
    shown = Shown()
    recipe = small_recipe(init=init, max_steps="60", round_prompts=6, reuse=4)
    make_trainer(tiny_checkpoint(), tmp_path / "run", recipe, shown=shown).train()
    first, last = ([shown.losses[i] for i in range(a, a + 10)] for a in (1, 51))
    assert sum(last) < 0.96 * sum(first)


def test_a_killed_job_goes_on_with_the_losses_of_an_uninterrupted_one(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    target, recipe = tiny_checkpoint(), small_recipe()
    # All in programs of the same kind: how a process set up its arithmetic is in the last bits.
    assert program(target, tmp_path / "whole", json.dumps(asdict(recipe))).returncode == 0
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 10))
    done = program(target, tmp_path / "killed", json.dumps(asdict(recipe)), 5)  # in the middle of a round
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert max(losses(tmp_path / "killed")) >= 4
    assert program(target, tmp_path / "killed", json.dumps(asdict(recipe))).returncode == 0
    assert losses(tmp_path / "killed") == whole
    ours, theirs = (load_checkpoint(tmp_path / name, DraftState) for name in ("whole", "killed"))
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    assert ours.state.tokens == theirs.state.tokens > 0


def test_two_ranks_train_what_one_process_trains(tiny_checkpoint: Any, tmp_path: Path) -> None:
    target, recipe = tiny_checkpoint(), small_recipe(max_steps="6")
    make_trainer(target, tmp_path / "one", recipe).train()
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")
    done = program(target, tmp_path / "two", json.dumps(asdict(recipe)), launcher=launcher)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-4)
    ranks = [torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*ranks)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint(tiny_checkpoint: Any, tmp_path: Path) -> None:
    target, recipe, run = tiny_checkpoint(), small_recipe(), tmp_path / "run"
    shown = Shown({2: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        make_trainer(target, run, recipe, shown=shown).train()
    loaded = load_checkpoint(run, DraftState)
    assert loaded is not None
    assert loaded.state.step == 2
    make_trainer(target, run, recipe).train()
    make_trainer(target, tmp_path / "whole", recipe).train()
    assert losses(run) == losses(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_budgets_end_the_job(tiny_checkpoint: Any, tmp_path: Path) -> None:
    by_steps = make_trainer(tiny_checkpoint(), tmp_path / "steps", small_recipe(max_steps="3")).train()
    by_tokens = make_trainer(
        tiny_checkpoint(), tmp_path / "tokens", small_recipe(max_steps=None, max_tokens="50")
    ).train()
    assert by_steps.step == 3
    assert 50 <= by_tokens.tokens < 50 + 40
    by_time = make_trainer(
        tiny_checkpoint(), tmp_path / "time", small_recipe(max_steps="1000", max_time="0.1s")
    ).train()
    assert by_time.step < 1000


def test_the_best_by_measured_tau_is_kept_and_patience_stops(tiny_checkpoint: Any, tmp_path: Path) -> None:
    written: list[tuple[str, Any]] = []
    state = make_trainer(
        tiny_checkpoint(),
        tmp_path / "run",
        small_recipe(max_steps="1000", eval_rounds=1, patience=2),
        judge=Measuring([1.0, 1.4, 1.3, 1.2, 2.0]),
        export=lambda folder, measured: written.append((folder.name, tuple(m["tau"] for m in measured))),
    ).train()
    assert [figures["tau"] for figures in state.measured] == [1.0, 1.4, 1.3, 1.2]
    assert [taus for name, taus in written if name == "best"] == [(1.0,), (1.4,)]
    assert state.best_tau == 1.4


@pytest.mark.parametrize(("source", "expected"), [("target", False), ("draft", True), ("mixed", True)])
def test_the_current_draft_is_handed_to_the_text_source(
    tiny_checkpoint: Any, tmp_path: Path, source: str, expected: bool
) -> None:
    text = Text()
    make_trainer(tiny_checkpoint(), tmp_path / "run", small_recipe(source=source), text=text).train()
    assert len(text.drafts) >= 2
    assert all((draft is not None) is expected for draft in text.drafts)


def test_precision_bf16_trains_about_the_same(tiny_checkpoint: Any, tmp_path: Path) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        shown = Shown()
        recipe: Recipe = small_recipe(precision=precision, max_steps="6")
        make_trainer(tiny_checkpoint(), tmp_path / precision, recipe, shown=shown).train()
        results[precision] = list(shown.losses.values())
    assert results["bf16"] != results["fp32"]
    assert results["bf16"] == pytest.approx(results["fp32"], rel=0.05)


def test_hard_labels_outside_the_draft_vocabulary_are_counted(tiny_checkpoint: Any, tmp_path: Path) -> None:
    state = make_trainer(tiny_checkpoint(), tmp_path / "run", small_recipe(loss="ce")).train()
    assert state.labels_outside > 10
    assert state.tokens > 10
