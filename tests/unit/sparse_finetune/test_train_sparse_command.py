"""``paceline train-sparse`` with everything real but the model's size: text, artifacts, report, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_job import CPU, opened_models, small_recipe

from paceline.clients import console
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.finetune.batch import make_batch
from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.sparse_finetune.opening import open_student
from paceline.draftmodels.sparse_finetune.recipe import (
    Recipe,
    load_recipe,
    packaged_recipes,
    recipe_keys,
    resumed_recipe,
)
from paceline.server.errors import ConfigError
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.student import declaration

SMALL_OPTIONS = "--batch-tokens 60 --held-out 2 --eval-every 3 --threads 1 --lr 3e-3 --warm-up 2 --dtype fp32"
SMALL = SMALL_OPTIONS.split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    words = ["one", "two three", "four", "on the sea", "here", "there it is", "is it", "at once"]
    lines: list[dict[str, str]] = [{"prompt": word, "answer": f"an answer to {word}"} for word in words]
    lines.append({"text": "the sea and the land"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(student: Path, data: Path, run: Path, *more: str) -> list[str]:
    return ["train-sparse", str(student), "--data", str(data), "-o", str(run), *SMALL, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.parametrize(
    ("pattern", "more", "stored"),
    [
        ("unstructured", ("--qat-steps", "2"), {"format": "bitmask", "value_dtype": "int8"}),
        ("2:4", ("--recipe", "ce-kl", "--checkpointing"), {"format": "n:m", "n": 2, "m": 4}),
        (
            "unstructured",
            ("--quantize", "none", "--train-embedding", "--learn", "all", "--dtype", "bf16"),
            {"format": "bitmask", "value_dtype": "fp32"},
        ),
    ],
    ids=["int8", "n-of-m", "fp32"],
)
def test_a_run_leaves_a_better_student(
    tiny_student: Any,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    more: tuple[str, ...],
    stored: dict[str, Any],
) -> None:
    student, run = tiny_student(pattern), tmp_path / "run"
    assert console.main(arguments(student, data, run, "--max-steps", "9", "--json", *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 9
    assert facts["measured"]["perplexity"] < facts["start"]["perplexity"]
    before, after = open_student(str(student)), open_student(str(run / "best"))
    manifest = after.checkpoint.manifest
    assert {key: manifest.weights[key] for key in stored} == stored
    assert manifest.base == before.checkpoint.manifest.base
    assert manifest.measured[0]["perplexity"] == facts["measured"]["perplexity"]
    told = f"KL {facts['measured']['kl']:.3f} nats, perplexity {facts['measured']['perplexity']:.2f} (parent "
    assert told in declaration(manifest, run)
    assert manifest.recipe["data"] == "data.jsonl"
    assert manifest.recipe["w_kl"] == (1.0 if "ce-kl" in more else 0.0)
    assert manifest.provenance["seed"] == 0
    assert before.kept.keys() == after.kept.keys()
    assert all(torch.equal(mask, after.kept[name]) for name, mask in before.kept.items())
    start, end = (c.checkpoint.tensor("model.embed_tokens.weight") for c in (before, after))
    kept = start.bfloat16() if stored.get("value_dtype") != "fp32" else start
    assert (end.dtype is kept.dtype and torch.equal(end, kept)) is ("--train-embedding" not in more)
    report = (run / "report.html").read_text()
    assert report.count("<img") == 3
    assert "seed" in report


def test_losses_against_another_teacher_are_not_those_against_the_parent(
    student: Path, tmp_path: Path, data: Path, tiny_checkpoint: Any
) -> None:
    teacher = ("--teacher", str(tiny_checkpoint("llama", seed=3)))
    assert console.main(arguments(student, data, tmp_path / "run", "--max-steps", "1", *teacher)) == 0
    manifest = NativeCheckpoint(tmp_path / "run" / "best").manifest
    assert manifest.measured[0]["teacher_perplexity"] > 1
    assert "by how much was not measured" in declaration(manifest, tmp_path)


def test_the_engine_serves_what_was_exported(student: Path, tmp_path: Path, data: Path) -> None:
    """In fp32, so that tokens are the same: the engine's int8 activations, which training lacks, would flip some."""
    more = ("--max-steps", "3", "--quantize", "none")
    assert console.main(arguments(student, data, tmp_path / "run", *more)) == 0
    best = NativeCheckpoint(tmp_path / "run" / "best")
    model, _, _ = opened_models(best.path, Path(best.manifest.base.id), small_recipe())
    local = LocalEngine(str(best.path), weights="fp32", threads=1, streams=2)
    try:
        (answer,) = local.generate([[5, 6, 7]], temperature=0.0, max_tokens=6, seed=0)
    finally:
        local.close()
    tokens: list[int] = [5, 6, 7]
    for _ in range(6):
        batch = make_batch([TokenSequence(tuple(tokens), 1)], CPU, answers_only=True)
        with torch.no_grad():
            tokens.append(int((model(batch)[-1][-1] @ model.head.T).argmax()))
    served = list(answer.tokens)
    assert len(served) > 3
    assert served == tokens[: len(served)]


def test_an_exported_student_can_be_trained_again(student: Path, tmp_path: Path, data: Path) -> None:
    assert console.main(arguments(student, data, tmp_path / "a", "--max-steps", "2")) == 0
    again = arguments(tmp_path / "a" / "best", data, tmp_path / "b", "--max-steps", "2")
    assert console.main(again) == 0
    start = NativeCheckpoint(tmp_path / "b" / "best").manifest.recipe["start"]
    assert start["recipe"]["method"] == "train-sparse"


def test_kill_and_resume_equal_the_uninterrupted_run(student: Path, tmp_path: Path, data: Path) -> None:
    common = ("--max-steps", "60", "--qat-steps", "30")
    command = [sys.executable, "-c", "from paceline.clients.console import main; main()"]
    killed = subprocess.Popen(
        [*command, *arguments(student, data, tmp_path / "killed", *common)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    file = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and len(read_metrics(file)) < 8:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error.decode()
    assert console.main(["train-sparse", str(student), "-o", str(tmp_path / "killed"), "--resume"]) == 0
    assert console.main(arguments(student, data, tmp_path / "whole", *common)) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_another_job_cannot_be_resumed(
    student: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert console.main(arguments(student, data, run, "--max-steps", "1")) == 0
    for changed, words in (
        (["train-sparse", "other", "-o", str(run), "--resume"], "was started with"),
        (["train-sparse", str(student), "-o", str(run), "--resume", "--lr", "0.5"], "--lr: the run was"),
        (["train-sparse", str(student), "-o", str(run), "--resume", "--recipe", "ce"], "--recipe"),
        (["train-draft", str(student), "-o", str(run), "--resume"], "run of another command"),
        (arguments(student, data, run), "--resume"),
    ):
        capsys.readouterr()
        assert console.main(changed) == 2
        assert words in capsys.readouterr().err


def test_what_does_not_fit_is_one_clear_line(
    tiny_checkpoint: Any,
    student: Path,
    parent: Path,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = tiny_checkpoint("llama", intermediate_size=128)
    other_tokens = tiny_checkpoint("llama", vocab_size=310)
    for index, (own, more, words) in enumerate(
        (
            (parent, (), "has no sparse weights; make a student with paceline sparsify"),
            (student, ("--teacher", str(wide)), "intermediate_size is 128, not 96"),
            (student, ("--teacher", str(other_tokens)), "vocab_size is 310, not 300"),
            (student, ("--teacher", str(tmp_path / "nothing")), "nothing"),
            (student, ("--held-out", "9"), "cannot hold out 9"),
            (student, ("--sequence-tokens", "1000"), "more than the student's context of 512"),
            (student, ("--data", str(tmp_path / "none.jsonl")), "none.jsonl"),
            (student, ("--device", "cuda"), "no CUDA device"),
        )
    ):
        capsys.readouterr()
        if "cuda" in more and torch.cuda.is_available():
            continue
        assert console.main(arguments(own, data, tmp_path / str(index), *more)) in (1, 2)
        error = capsys.readouterr().err.splitlines()[-1]
        assert words in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "--data: name a file"),
        ({"data": "x", "w_ce": "0", "w_sq": "0"}, "nothing to learn"),
        ({"data": "x", "w_ce": "0", "train_embedding": True}, "train_embedding"),
        ({"data": "x", "qat_steps": "5", "quantize": "none"}, "--qat-steps: there is no rounding"),
        ({"data": "x", "w_sq": "-1"}, "--w-sq: expected a number"),
        ({"data": "x", "max_tokens": "some"}, "--max-tokens: expected a number"),
        ({"data": "x", "quantize": "int4"}, "--quantize"),
    ],
)
def test_contradictions_are_one_line(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(None, flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "weights"), [("squarehead", (1, 0, 1)), ("ce", (1, 0, 0)), ("ce-kl", (1, 1, 0))]
)
def test_packaged_recipes_are_losses(name: str, weights: tuple[int, int, int]) -> None:
    recipe = load_recipe(name, {"data": "x"})
    assert (recipe.w_ce, recipe.w_kl, recipe.w_sq) == weights
    assert name in packaged_recipes()


def test_a_resumed_run_keeps_its_recipe_but_for_the_budget() -> None:
    saved = {"data": "x", "lr": 0.005, "max_steps": "10"}
    assert resumed_recipe(saved, {"max_steps": "20"}, "run") == Recipe(data="x", lr=0.005, max_steps="20")
    with pytest.raises(ConfigError, match=r"--w-kl: the run was started with 0\.0"):
        resumed_recipe(saved, {"w_kl": "1"}, "run")


def test_every_key_is_a_flag_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["train-sparse", "--help"]) == 0
    text = capsys.readouterr().out
    assert not [key.flag for key in recipe_keys() if key.flag not in text]
