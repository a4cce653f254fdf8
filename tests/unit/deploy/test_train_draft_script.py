"""The training job of the containers: publishes a draft that a server loads, goes on after SIGTERM, tidies up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from deploy_files import DEPLOY
from engines import request, spec, tiny_engine, tokens

from paceline.draftmodels.jobs.metrics import read_metrics

SCRIPT = DEPLOY / "train-draft.sh"
STEPS = 40
SMALL = (
    "--init feature --round-prompts 4 --answer-tokens 8 --batch-tokens 60 --held-out 2 --eval-tokens 8 "
    f"--eval-rounds 2 --streams 4 --threads 1 --precision fp32 --weights fp32 --max-steps {STEPS}"
)


def command(target: Path, folder: Path) -> list[str]:
    prompts = folder / "prompts.jsonl"
    words = ("one", "two", "the sea", "is it", "on")
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    return ["sh", str(SCRIPT), str(target), "--prompts", str(prompts), *SMALL.split()]


def losses(metrics: Path) -> list[int]:
    """Steps that were trained."""
    return [line["step"] for line in read_metrics(metrics) if "loss" in line]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The job's; ``paceline`` is the one beside this Python."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DRAFTS": str(tmp_path / "drafts"),
        "KEEP": "1",
        "PACELINE_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_that_was_stopped_goes_on_and_a_server_takes_its_draft(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, environment: dict[str, str], own_cache: Path
) -> None:
    target, drafts = tiny_checkpoint("llama"), tmp_path / "drafts"
    (drafts / "published" / "2020-01-01T00-00-00").mkdir(parents=True)
    job, metrics = command(target, tmp_path), drafts / "runs" / "unfinished" / "metrics.jsonl"

    stopped = subprocess.Popen(job, env=environment, stderr=subprocess.PIPE)
    while stopped.poll() is None and len(read_metrics(metrics)) < 3:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    _, error = stopped.communicate()
    assert stopped.returncode == 130, error.decode()
    assert 0 < len(losses(metrics)) < STEPS
    assert not (drafts / "current").exists()

    finished = subprocess.run(job, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    current = drafts / "current"
    assert f"as {current}" in finished.stdout
    assert not current.readlink().is_absolute()  # the volume may be mounted elsewhere
    (run,) = (drafts / "runs").iterdir()
    assert losses(run / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert (
        [folder.name for folder in (drafts / "published").iterdir()] == [run.name] == [current.resolve().name]
    )

    drafting = tiny_engine(spec(target, draft=current, max_draft_tokens=3))
    assert drafting._models["m"].info.default_draft == "current"
    plain = tiny_engine(spec(target, draft=None))
    texts = [tokens(engine, request([5, 80, 17], max_tokens=12)) for engine in (drafting, plain)]
    assert texts[0] == texts[1]
