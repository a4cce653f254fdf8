"""``paceline train-draft`` with everything real but the model's size: engine, teacher, shards, artifacts, resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.clients import console
from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.native_form import NativeCheckpoint

SMALL_OPTIONS = (
    "--draft-vocab 100 --round-prompts 4 --answer-tokens 12 --batch-tokens 60 --held-out 2 --eval-tokens 8 "
    "--eval-rounds 1 --streams 4 --threads 1 --precision fp32 --reuse 2 --weights fp32"
)
SMALL = SMALL_OPTIONS.split()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    words = ["one", "two three", "four", "on the sea", "here", "there it is", "is it", "at once"]
    path.write_text(
        "".join(json.dumps({"prompt": word, "answer": f"an answer to {word}"}) + "\n" for word in words)
    )
    return path


def arguments(target: Path, prompts: Path, run: Path, *more: str) -> list[str]:
    return ["train-draft", str(target), "--prompts", str(prompts), "-o", str(run), *SMALL, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.parametrize(
    "more",
    [
        ("--source", "target", "--layers", "2", "--unroll", "3"),
        ("--source", "mixed", "--lambda", "0.5", "--loss", "jsd:0.1"),
        ("--source", "fixed", "--loss", "ce", "--init", "layers:1"),
        ("--source", "draft", "--loss", "lk", "--init", "random", "--hidden", "32", "--heads", "2"),
        ("--loss", "fkl", "--top-k", "8", "--taid", "0.4", "--init", "layers:0", "--train-head"),
    ],
    ids=["feature", "feature-mixed", "cut-ce", "random-on-policy", "cut-top-k-taid"],
)
def test_a_run_leaves_a_measured_draft(
    tiny_checkpoint: Any,
    tmp_path: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    target, run = tiny_checkpoint(), tmp_path / "run"
    assert console.main(arguments(target, prompts, run, "--max-steps", "5", "--json", *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 5
    assert facts["trained_tokens"] > 10
    assert facts["measured"]["tau"] >= 1
    artifact = NativeCheckpoint(run / "best", open_checkpoint(target))
    assert artifact.manifest.measured[0]["tau"] == facts["measured"]["tau"]
    assert artifact.manifest.recipe["loss"] == (more[more.index("--loss") + 1] if "--loss" in more else "fkl")
    assert artifact.manifest.recipe["prompts"] == "prompts.jsonl"
    assert (run / "report.html").exists()
    assert len(losses(run)) == 5
    assert all(loss == loss for loss in losses(run).values())


def test_kill_and_resume_equal_the_uninterrupted_run(
    tiny_checkpoint: Any, tmp_path: Path, prompts: Path
) -> None:
    target = tiny_checkpoint()
    common = ("--source", "mixed", "--max-steps", "40")
    command = [sys.executable, "-c", "from paceline.clients.console import main; main()"]
    killed = subprocess.Popen(
        [*command, *arguments(target, prompts, tmp_path / "killed", *common)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    file = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and len(read_metrics(file)) < 5:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error.decode()
    assert console.main(["train-draft", str(target), "-o", str(tmp_path / "killed"), "--resume"]) == 0
    assert console.main(arguments(target, prompts, tmp_path / "whole", *common)) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    taus = [
        [
            line["measured"]["tau"]
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if "measured" in line
        ]
        for name in ("killed", "whole")
    ]
    assert taus[0] == taus[1]


def test_another_job_cannot_be_resumed(
    tiny_checkpoint: Any, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert console.main(arguments(tiny_checkpoint(), prompts, run, "--max-steps", "2")) == 0
    for changed, words in (
        (["train-draft", "other", "-o", str(run), "--resume"], "was started with"),
        (
            ["train-draft", str(tiny_checkpoint()), "-o", str(run), "--resume", "--lr", "0.5"],
            "--lr: the run was",
        ),
        (arguments(tiny_checkpoint(), prompts, run), "--resume"),
    ):
        capsys.readouterr()
        assert console.main(changed) == 2
        assert words in capsys.readouterr().err
