"""A draft for the real model, trained by the packaged feature recipe: killed and resumed, it loses nothing."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from native_kernels import require_native
from real_models import SMOLLM2

from paceline.draftmodels.jobs.metrics import read_metrics

pytestmark = pytest.mark.real

PROMPTS = [
    "Why do ships float?",
    "Name three rivers.",
    "What is bread made of?",
    "How does a mill work?",
    "Tell me about winter.",
    "Who sails at night?",
]
#: A round is two steps; a checkpoint follows each round.
SMALL = (
    "--recipe feature --round-prompts 4 --held-out 2 --streams 4 --answer-tokens 24 --reuse 1 --batch-tokens 128 "
    "--eval-rounds 9 --eval-tokens 4 --threads 2 --weights int8 --max-steps 6"
)


def command(run: Path, *more: str) -> list[str]:
    program = str(Path(sys.executable).with_name("paceline"))
    return [program, "train-draft", SMOLLM2, "-o", str(run), *more]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}


def taus(run: Path) -> list[float]:
    lines = read_metrics(run / "metrics.jsonl")
    return [line["measured"]["tau"] for line in lines if "measured" in line]


def test_kill_and_resume_equal_the_uninterrupted_run(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    require_native()
    real_model(SMOLLM2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    new = ("--prompts", str(prompts), *SMALL.split())
    killed = subprocess.Popen(command(tmp_path / "killed", *new), stderr=subprocess.PIPE)
    while killed.poll() is None and len(losses(tmp_path / "killed")) < 4:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error.decode()
    steps = [
        int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "killed").glob("checkpoint-*")
    ]
    assert max(steps) >= 2, "resuming would be starting again"
    for run, more in ((tmp_path / "killed", ("--resume",)), (tmp_path / "whole", new)):
        subprocess.run(command(run, *more), check=True, capture_output=True)
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 7))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert taus(tmp_path / "killed") == taus(tmp_path / "whole")
