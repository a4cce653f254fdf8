"""``paceline evaluate steering`` through the real engine, on tiny models, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from steered import FORMULAS, Oracle
from typer.testing import CliRunner, Result

from paceline.draftmodels.evaluate.cli import app
from paceline.draftmodels.evaluate.steering.figures import gap_closed
from paceline.draftmodels.evaluate.steering.tasks import is_right, last_number, read_questions
from paceline.server.errors import ArtifactError, ConfigError, DataError
from paceline.server.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TEXTS = ("the onion", "a tall tree", "it is here", "no one came")
MAX_TOKENS = 12
FAST = ("--max-tokens", str(MAX_TOKENS), "--streams", "2", "--timed", "2")

Write = Callable[..., Path]


@pytest.fixture
def expert(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=1, num_hidden_layers=1)


@pytest.fixture
def anti(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=2, num_hidden_layers=1)


@pytest.fixture
def tuned(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=3)


@pytest.fixture
def config(target: Path, expert: Path, anti: Path, tmp_path: Path) -> Write:
    """``config(pair=..., speculation=..., model=...)`` -> a file with one steered model, further lines in its tables."""

    def write(pair: str = "", speculation: str = 'draft = "expert"', more: str = "") -> Path:
        path = tmp_path / "steered.toml"
        path.write_text(
            f"""
            [engine]
            device = "cpu"
            threads = 1
            [[models]]
            name = "steered-tiny"
            target = "{target}"
            weights = "fp32"
            [models.speculation]
            policy = "fixed"
            max_draft_tokens = 3
            {speculation}
            [[models.steering]]
            name = "p"
            expert = "{expert}"
            anti_expert = "{anti}"
            {pair}
            {more}
            """
        )
        return path

    return write


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


def write_task(path: Path, answers: list[str], tasks: str = "ab") -> Path:
    lines = [
        {"prompt": text, "answer": answer, "task": tasks[i % len(tasks)]}
        for i, (text, answer) in enumerate(zip(TEXTS, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["steering", *map(str, arguments)], catch_exceptions=False)


def report(*arguments: object) -> dict[str, Any]:
    done = evaluate(*arguments, *FAST, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prompt(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return ids


class Loop:
    """The report's figures by transformers: greedy text of every variant, one question after the other."""

    def __init__(self, oracle: Oracle, target: Path, expert: Path, anti: Path) -> None:
        self.tokenizer = load_tokenizer(target)
        self._oracle, self._members = oracle, (target, expert, anti)

    def steered(self, text: str, alpha: float) -> list[int]:
        prompts = dict.fromkeys(self._members, prompt(self.tokenizer, text))
        return self._oracle.greedy(
            lambda m, e, a: FORMULAS["proxy"](m, e, a, alpha), prompts, MAX_TOKENS, eos=3
        )

    def alone(self, model: Path, text: str) -> list[int]:
        prompts = {model: prompt(self.tokenizer, text)}
        return self._oracle.greedy(lambda s: s, prompts, MAX_TOKENS, eos=3)

    def differing(self, text: str, output: list[int]) -> int:
        given = prompt(self.tokenizer, text)
        said = self._oracle.logits(self._members[0], [*given, *output])[len(given) - 1 : -1]
        return int((np.argmax(said, axis=-1) != np.array(output)).sum())

    def said(self, output: list[int]) -> str:
        return self.tokenizer.decode(output)


def test_scores_gap_and_changed_tokens_are_those_of_a_plain_loop(
    kernels: str,
    config: Write,
    oracle: Oracle,
    target: Path,
    expert: Path,
    anti: Path,
    tuned: Path,
    tmp_path: Path,
) -> None:
    """Answers are chosen so that base, expert, tuned model and each strength have their own ones right."""
    loop = Loop(oracle, target, expert, anti)
    texts = {alpha: [loop.steered(text, alpha) for text in TEXTS] for alpha in (0.0, 0.5, 1.5)}
    ceiling = [loop.alone(tuned, text) for text in TEXTS]
    alone = [loop.alone(expert, text) for text in TEXTS]
    assert texts[1.5] != texts[0.5] != texts[0.0]
    # Task a (questions 0 and 2): the tuned model has one right, the steered one of alpha 1.5 the other; task b (1 and 3):
    # the expert has one right, and so has alpha 0.5.
    right = [ceiling[0], alone[1], texts[1.5][2], texts[0.5][3]]
    data = write_task(tmp_path / "task.jsonl", [loop.said(output) for output in right])
    found = report("--config", config(), "--data", data, "--tuned", tuned, "--alphas", "1.5,0,0.5")

    rows = {row["label"]: row for row in found["variants"]}
    outputs = {
        "base": texts[0.0],
        "expert": alone,
        "tuned": ceiling,
        **{f"alpha {alpha:g}": texts[alpha] for alpha in (0.0, 0.5, 1.5)},
    }
    assert list(rows) == list(outputs)
    means = {}
    for label, said in outputs.items():
        hits = [loop.said(a).strip() == loop.said(b).strip() for a, b in zip(said, right, strict=True)]
        tasks = rows[label]["tasks"]
        assert [tasks["a"]["right"], tasks["b"]["right"]] == [hits[0] + hits[2], hits[1] + hits[3]], label
        assert (tasks["a"]["n"], tasks["b"]["n"]) == (2, 2)
        means[label] = sum(hits) / 4
        assert rows[label]["mean"] == means[label]
        assert rows[label]["n_tokens"] == sum(map(len, said))
    assert means["tuned"] > means["base"], "or there were no gap"
    for alpha in (0.0, 0.5, 1.5):
        row, said = rows[f"alpha {alpha:g}"], texts[alpha]
        expected = (means[row["label"]] - means["base"]) / (means["tuned"] - means["base"])
        assert row["gap_closed"] == pytest.approx(expected)
        changed = sum(map(loop.differing, TEXTS, said))
        assert row["argmax_changed"] == pytest.approx(changed / sum(map(len, said)))
    assert rows["alpha 0"]["argmax_changed"] == 0 < rows["alpha 1.5"]["argmax_changed"]
    # Of task b the tuned model has none right, nor has the base: there is no gap.
    assert rows["alpha 0.5"]["tasks"]["b"]["gap_closed"] is None
    assert rows["alpha 1.5"]["tasks"]["a"]["gap_closed"] == 1
    assert rows["base"]["gap_closed"] is rows["tuned"]["gap_closed"] is None
