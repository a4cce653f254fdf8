"""``paceline train-expert`` with everything real but the model's size: a task is learnt, kill and resume, ranks."""

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
from conftest import TinyCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.clients import console
from paceline.draftmodels.cut import cut_draft
from paceline.draftmodels.expert_finetune.recipe import load_recipe, recipe_keys, resumed_recipe
from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.errors import ConfigError
from paceline.server.models.manifest import read_manifest
from paceline.server.models.native_form import open_model
from paceline.server.models.tokenizer import load_tokenizer

SMALL_OPTIONS = (
    "--batch-tokens 240 --held-out 8 --eval-every 4 --threads 1 --lr 3e-3 --warm-up 2 --dtype fp32"
)
SMALL = SMALL_OPTIONS.split()
MAIN = (sys.executable, "-c", "from paceline.clients.console import main; raise SystemExit(main())")
LAUNCH_OPTIONS = "-m torch.distributed.run --nproc-per-node=2 --master-port=0 --standalone --no-python"
LAUNCHER = LAUNCH_OPTIONS.split()


def arguments(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    return ["train-expert", str(model), "--data", str(data), "-o", str(run), *SMALL, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("store", ["bf16", "fp32"])
def test_a_task_is_learnt_and_what_is_left_serves(
    target: Path,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    kernels: str,
    store: str,
) -> None:
    run = tmp_path / "run"
    more = ("--max-steps", "60", "--eval-every", "20", "--answer-always", "--store", store, "--json")
    assert console.main(arguments(target, data, run, *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["start"]["exact_match"] == 0.0
    assert facts["measured"]["exact_match"] == 1.0
    assert facts["measured"]["n_prompts"] == 8
    assert facts["measured"]["loss"] < 0.1 < 2 < facts["start"]["loss"]
    manifest = read_manifest(run / "best")
    assert manifest is not None
    assert (manifest.kind, manifest.weights) == ("expert", {"format": store})
    (figures,) = manifest.measured
    assert (figures["dataset"], figures["split"]) == ("task.jsonl", "held out")
    assert {key: figures[key] for key in facts["measured"]} == facts["measured"]
    assert manifest.base.weights_sha256 == open_model(target).weights_sha256()
    assert manifest.base.tokenizer_sha256 == load_tokenizer(target).sha256
    assert (manifest.base.id, manifest.base.vocab_size) == (str(target), 300)
    assert (manifest.recipe["data"], manifest.provenance["seed"]) == ("task.jsonl", 0)
    assert (run / "report.html").read_text().count("<img") == 3

    asked = "blue 123"
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "best"),
        AutoTokenizer.from_pretrained(run / "best"),
    )
    stored = torch.bfloat16 if store == "bf16" else torch.float32
    weights = open_model(run / "best")
    assert hf.dtype is stored
    assert {weights.tensor(name).dtype for name in weights.tensor_names()} == {stored}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
    )
    theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    engine = LocalEngine(run / "best", weights=store, threads=1, streams=2)  # type: ignore[arg-type]
    try:
        (ours,) = engine.generate([prompt], temperature=0.0, max_tokens=12, seed=0)
    finally:
        engine.close()
    assert list(ours.answer) == theirs
    assert tokenizer.decode(theirs) == "cold<|im_end|>"


def test_plain_prompts_are_learnt_and_a_cut_model_can_be_the_start(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_draft(str(tiny_checkpoint("qwen2", num_hidden_layers=3)), (0, 2), tmp_path / "cut")
    more = ("--template", "plain", "--max-steps", "80", "--eval-every", "40", "--json")
    assert console.main(arguments(tmp_path / "cut", data, tmp_path / "run", *more)) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["exact_match"] == 1.0
    best = tmp_path / "run" / "best"
    manifest = read_manifest(best)
    assert manifest is not None
    assert manifest.recipe["start"]["recipe"] == {"init": {"method": "cut", "layers": [0, 2]}}
    names = open_model(best).tensor_names()
    assert "lm_head.weight" not in names  # it is tied
    assert "model.layers.2.mlp.up_proj.weight" not in names
    prompt = load_tokenizer(best).encode("red 77")
    engine = LocalEngine(best, weights="bf16", threads=1, streams=2)
    try:
        (answer,) = engine.generate([prompt], temperature=0.0, max_tokens=12, seed=0)
        assert engine.tokenizer.decode(answer.answer) == "hot"
    finally:
        engine.close()


def test_the_best_by_held_out_loss_is_kept_and_answers_come_at_the_end(
    target: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("--lr", "0.05", "--max-steps", "1000", "--eval-every", "1", "--patience", "2", "--json")
    assert console.main(arguments(target, data, run, *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    measured = [line["measured"] for line in read_metrics(run / "metrics.jsonl") if "measured" in line]
    assert len(measured) < 100
    assert facts["measured"]["loss"] == min(figures["loss"] for figures in measured)
    assert not any("exact_match" in figures for figures in measured)
    assert 0 <= facts["measured"]["exact_match"] <= 1
    manifest = read_manifest(run / "best")
    assert manifest is not None
    assert manifest.measured[0]["step"] == facts["measured"]["step"]
    assert manifest.measured[0]["exact_match"] == facts["measured"]["exact_match"]


def test_answers_can_be_left_out_and_text_says_what_was_made(
    target: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--epochs", "1", "--answer-prompts", "0", "--checkpointing", "--learn", "all")
    assert console.main(arguments(target, data, tmp_path / "run", *more)) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'run' / 'best'}: loss " in text
    assert "answers exact" not in text
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert {line["epoch"] for line in lines} == {0}
    # With the prompts learnt, all tokens are but the first of each of the 40 sequences.
    assert sum(line["learnt"] for line in lines) == lines[-1]["tokens"] - 40


def test_kill_and_resume_equal_the_uninterrupted_run(target: Path, tmp_path: Path, data: Path) -> None:
    killed = subprocess.Popen(
        [*MAIN, *arguments(target, data, tmp_path / "killed", "--max-steps", "60")],
        stderr=subprocess.PIPE,
        env=environment(),
    )
    file = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and len(read_metrics(file)) < 10:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error.decode()
    # Both of the rest in this process: how a process set up its arithmetic is in the last bits, but not visible here.
    assert console.main(["train-expert", str(target), "-o", str(tmp_path / "killed"), "--resume"]) == 0
    assert console.main(arguments(target, data, tmp_path / "whole", "--max-steps", "60")) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_two_ranks_train_what_one_process_trains(target: Path, tmp_path: Path, data: Path) -> None:
    more = ("--max-steps", "6", "--accumulate", "2", "--batch-tokens", "120")
    assert console.main(arguments(target, data, tmp_path / "one", *more)) == 0
    command = [sys.executable, *LAUNCHER, *MAIN, *arguments(target, data, tmp_path / "two", *more, "--json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6  # one line: from the main rank
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-4)


def test_another_job_cannot_be_resumed(
    target: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert console.main(arguments(target, data, run, "--max-steps", "1")) == 0
    for changed, words in (
        (["train-expert", "other", "-o", str(run), "--resume"], "MODEL: "),
        (["train-expert", str(target), "-o", str(run), "--resume", "--lr", "0.5"], "--lr: the run was"),
        (["train-expert", str(target), "-o", str(run), "--resume", "--recipe", "x"], "--recipe"),
        (["train-sparse", str(target), "-o", str(run), "--resume"], "run of another command"),
        (["train-expert", str(target), "-o", str(tmp_path / "none"), "--resume"], "holds no training run"),
        (arguments(target, data, run), "in use; go on with --resume"),
    ):
        capsys.readouterr()
        assert console.main(changed) == 2
        assert words in capsys.readouterr().err


def test_what_does_not_fit_is_one_clear_line(
    tiny_checkpoint: TinyCheckpoint,
    target: Path,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    for index, (model, more, words) in enumerate(
        (
            (tmp_path / "nothing", (), "nothing"),
            (target, ("--held-out", "48"), "cannot hold out 48 of 48"),
            (target, ("--sequence-tokens", "1000"), "more than the model's context of 512"),
            (target, ("--data", str(tmp_path / "none.jsonl")), "none.jsonl"),
            (target, ("--data", str(bad)), f"{bad}:2: has no answer"),
            (target, ("--device", "cuda"), "no CUDA device"),
            (target, ("--recipe", "none"), "there is no file none"),
            (target, ("--template", "jinja"), "--template"),
            (target, ("--epochs", "0"), "--epochs"),
            (
                target,
                ("--answer-always", "--answer-prompts", "0"),
                "--answer-always: there is nothing to answer",
            ),
        )
    ):
        capsys.readouterr()
        if "cuda" in more and torch.cuda.is_available():
            continue
        assert console.main(arguments(model, data, tmp_path / str(index), *more)) in (1, 2)
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_an_artifact_in_native_form_is_sent_to_export(
    target: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_students import write_tiny_student

    student = write_tiny_student(tmp_path / "student", target)
    assert console.main(arguments(student, data, tmp_path / "run")) == 2
    assert "paceline export --standalone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "--data: name a JSONL file"),
        ({"data": "x", "max_tokens": "some"}, "--max-tokens: expected a number"),
        ({"data": "x", "store": "int8"}, "--store"),
        ({"data": "x", "epochs": "-1"}, "--epochs"),
    ],
)
def test_contradictions_are_one_line(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(None, flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_file_has_the_keys_of_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('data = "x"\nepochs = 2.0\nstore = "fp32"\n')
    recipe = load_recipe(str(file), {"store": "bf16"})
    assert (recipe.epochs, recipe.store) == (2.0, "bf16")
    file.write_text("epoch = 2\n")
    with pytest.raises(ConfigError, match="epochs"):
        load_recipe(str(file), {"data": "x"})


def test_a_resumed_run_may_have_another_budget_only() -> None:
    saved = {"data": "x", "epochs": 1.0}
    assert resumed_recipe(saved, {"epochs": "2"}, "run").epochs == 2.0
    with pytest.raises(ConfigError, match=r"--template: the run was started with auto"):
        resumed_recipe(saved, {"template": "plain"}, "run")


def test_every_key_is_a_flag_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["train-expert", "--help"]) == 0
    text = capsys.readouterr().out
    assert not [key.flag for key in recipe_keys() if key.flag not in text]
