"""Recipes: every key from file and flag, the flag wins, contradictions and misspelt keys are one clear line."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from paceline.clients import console
from paceline.draftmodels.distill.config import (
    Recipe,
    load_recipe,
    packaged_recipes,
    recipe_keys,
    resumed_recipe,
)
from paceline.draftmodels.distill.optim import learning_rate
from paceline.draftmodels.jobs.budget import Budget, Patience, parse_count, parse_seconds
from paceline.server.errors import ConfigError


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, 'loss = "rkl"\nlr = 0.01\nsource = "mixed"\nlambda = 0.3\ndraft_vocab = 100\n')
    recipe = load_recipe(path, {"lr": "0.02", "draft_vocab": "full"})
    assert (recipe.loss, recipe.lr, recipe.lambda_, recipe.draft_vocab) == ("rkl", 0.02, 0.3, None)
    assert recipe.from_draft == 0.3
    assert recipe.reuse == Recipe().reuse


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_load(name: str) -> None:
    assert load_recipe(name, {}) != Recipe()


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("los = 1", {}, 'did you mean "loss"'),
        ("lr = -1", {}, "lr: expected a number above 0"),
        ("", {"loss": "klf"}, "--loss: expected fkl, rkl"),
        ("", {"loss": "jsd:2"}, "--loss"),
        ("", {"lambda_": "0.3"}, '--lambda: only source "mixed"'),
        ("", {"source": "fixed"}, "--prompts FILE"),
        ("", {"source": "fixed", "prompts": "x.txt", "temperature": "1"}, "samples nothing"),
        ("", {"hidden": "64"}, "--hidden: init"),
        ("", {"layers": "3"}, "1 or 2 layers"),
        ("", {"init": "layers:0,1", "layers": "2"}, "--layers"),
        ("", {"init": "random", "unroll": "3"}, "--unroll"),
        ("", {"init": "random", "block_from": "3"}, "--block-from"),
        ("", {"init": "layers:0", "join_from": "random"}, "--join-from"),
        ("", {"loss": "ce", "taid": "0.5"}, "--taid"),
        ("", {"train_embedding": True}, "--train-embedding"),
        ("", {"draft_vocab": "100", "top_k": "100"}, "top_k 100"),
        ("", {"max_time": "soon"}, "--max-time: expected a time"),
        ("", {"max_tokens": "0"}, "above 0"),
        ("", {"prompts": "x.txt", "self_prompts": "5"}, "--self-prompts"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, text), flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "flags", "rate"),
    [
        ("", {}, 2e-3),
        ('init = "random"', {}, 2e-3),
        ('init = "layers:0,1"', {}, 2e-3),
        ("", {"init": "runs/old/best"}, 4e-4),
        ("", {"init": "runs/old/best", "lr": "0.001"}, 1e-3),
        ("lr = 0.003", {"lr": "auto"}, 2e-3),
    ],
)
def test_a_trained_draft_learns_more_slowly_unless_told(
    tmp_path: Path, text: str, flags: dict[str, Any], rate: float
) -> None:
    recipe = load_recipe(write(tmp_path, text), flags)
    assert recipe.peak_lr == rate
    assert learning_rate(recipe, recipe.warmup) == pytest.approx(rate)
    assert learning_rate(recipe, 1.0) == pytest.approx(rate * recipe.final_lr)


def test_a_resumed_run_keeps_its_recipe_but_for_the_budget() -> None:
    saved = asdict(Recipe(lr=0.005, max_steps="10"))
    assert resumed_recipe(saved, {"max_steps": "20", "lr": "0.005"}, "run").max_steps == "20"
    with pytest.raises(ConfigError, match=r"--lr: the run was started with 0\.005"):
        resumed_recipe(saved, {"lr": "0.001"}, "run")


def test_every_key_is_a_flag_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["train-draft", "--help"]) == 0
    text = capsys.readouterr().out
    assert not [key.flag for key in recipe_keys() if key.flag not in text]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], "holds no training run"),
        (["--resume", "--recipe", "feature"], "--recipe"),
        (["--lambda", "2"], "--lambda"),
        (["--recipe", "nothing"], "packaged are: distillspec, feature"),
    ],
)
def test_the_command_line_answers_mistakes_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert console.main(["train-draft", "target", "-o", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_folder_in_use_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert console.main(["train-draft", "target", "-o", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_amounts() -> None:
    assert [parse_seconds(text, "x") for text in ("90", "20m", "1h30m", "1.5h", "2d")] == [
        90,
        1200,
        5400,
        5400,
        172800,
    ]
    assert [parse_count(text, "x") for text in ("500", "300k", "1.5M")] == [500, 300_000, 1_500_000]
    for text in ("20x", "m", "", "-5", "1e3"):
        with pytest.raises(ConfigError, match="x: "):
            parse_seconds(text, "x")
        with pytest.raises(ConfigError, match="x: "):
            parse_count(text, "x")


def test_the_nearest_limit_decides() -> None:
    budget = Budget(seconds=100, tokens=None, steps=10)
    assert budget.used(seconds=20, tokens=10**9, steps=5) == 0.5
    assert budget.seconds_left(seconds=20, tokens=0, steps=5) == 20
    assert Recipe().budget == Budget(seconds=1200)
    assert Recipe(max_steps="5").budget == Budget(steps=5)


def test_patience() -> None:
    assert not Patience(0).exhausted([2.0, 1.0, 1.0, 1.0])
    assert not Patience(2).exhausted([1.0, 1.2])
    assert not Patience(2).exhausted([1.0, 1.0, 1.2])
    assert Patience(2).exhausted([1.2, 1.2, 1.2])
