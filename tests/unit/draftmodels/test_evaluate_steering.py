"""``paceline evaluate steering`` through the real engine, on tiny models, against transformers."""

import json
import shutil
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
    """``config(pair=..., speculation=..., model=...)`` -> a file with a steered model, with further lines."""

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
    # Task a (questions 0 and 2): the tuned model has one right, alpha 1.5 the other; task b: the expert, and alpha 0.5.
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


def test_speculation_changes_no_text_and_files_hold_the_report(config: Write, tmp_path: Path) -> None:
    data, out = write_task(tmp_path / "task.jsonl", ["x"] * 4), tmp_path / "out"
    found = report("--config", config(), "--data", data, "--alphas", "0,1", "--rounds", "2", "-o", out)
    assert found["setting"]["draft"] == "expert"
    assert [row["label"] for row in found["variants"]] == ["base", "expert", "alpha 0", "alpha 1"]
    base, alone, off, on = found["variants"]
    for row in (on, base):
        assert [speed["streams"] for speed in row["speeds"]] == [1, 2]
        for speed in row["speeds"]:
            assert len(speed["rounds"]) == 2
            assert speed["same_text"] == [2, 2]
            assert speed["on"] > 0
            assert speed["off"] > 0
    assert on["acceptance"]["num_draft_tokens"] > 0
    assert sum(on["acceptance"]["acceptance_histogram"]) == on["acceptance"]["num_spec_steps"]
    # The expert drafts for what it steers only; by itself it has no draft.
    assert base["acceptance"] is None
    assert alone["acceptance"] is None
    assert [speed["on"] for speed in alone["speeds"]] == [None, None]
    assert {**off, "label": "", "strength": None, "argmax_changed": None} == {**base, "label": ""}
    assert on["gap_closed"] is None
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["where"] for line in answers] == [f"{data}:{i}" for i in (1, 2, 3, 4)]
    assert all(set(line["texts"]) == {"base", "expert", "alpha 1"} for line in answers)
    with pytest.raises(ConfigError, match="holds a report already"):
        evaluate("--config", config(), "--data", data, "-o", out)


def test_the_tables_for_people(config: Write, tuned: Path, tmp_path: Path) -> None:
    data = write_task(tmp_path / "task.jsonl", ["x"] * 4, tasks="a")
    arguments = ("--config", config(), "--data", data, "--alphas", "1", *FAST)
    done = evaluate(*arguments)
    assert done.exit_code == 0
    for words in (
        "gap closed",
        "alpha 1",
        "expert",
        "tau",
        "without --tuned there is no ceiling",
        "same: answers that are equal",
    ):
        assert words in done.output
    done = evaluate(*arguments, "--tuned", tuned, "--rounds", 0)
    assert "no gap to close, as the tuned model is no better than the base: a" in done.output


def test_members_read_what_they_read_when_served(
    config: Write, oracle: Oracle, target: Path, expert: Path, anti: Path, tmp_path: Path
) -> None:
    """The expert's answer goes on from its own prefix, steering and alone."""
    loop = Loop(oracle, target, expert, anti)
    given = prompt(loop.tokenizer, TEXTS[0])
    prefix = loop.tokenizer.encode(" so then", add_special_tokens=False)
    prompts = {target: given, expert: [*given, *prefix], anti: given}
    steered = oracle.greedy(of_strength_one, prompts, MAX_TOKENS, eos=3)
    alone = oracle.greedy(lambda s: s, {expert: [*given, *prefix]}, MAX_TOKENS, eos=3)
    assert steered != loop.steered(TEXTS[0], 1.0)
    data, out = write_task(tmp_path / "task.jsonl", ["x"] * 4), tmp_path / "out"
    file = config(pair='response_prefix = " so then"')
    report("--config", file, "--data", data, "--alphas", "1", "--rounds", "0", "-o", out)
    said = json.loads((out / "answers.jsonl").read_text().splitlines()[0])["texts"]
    assert said["alpha 1"] == loop.said(steered)
    assert said["expert"] == loop.said(alone)


def of_strength_one(m: np.ndarray, e: np.ndarray, a: np.ndarray) -> np.ndarray:
    combined: np.ndarray = FORMULAS["proxy"](m, e, a, 1.0)
    return combined


def test_one_of_several_pairs_sweeps(
    config: Write, oracle: Oracle, target: Path, expert: Path, anti: Path, tmp_path: Path
) -> None:
    """The other keeps its strength, so that a strength of 0 is not the base."""
    more = f"""
        [[models.steering]]
        name = "q"
        mode = "amplify"
        expert = "{anti}"
        anti_expert = "{expert}"
        beta = 0.5
        """
    data, file = write_task(tmp_path / "task.jsonl", ["x"] * 4), config(more=more)
    with pytest.raises(ConfigError, match="several pairs; choose with --pair the one to sweep: p, q"):
        evaluate("--config", file, "--data", data)
    with pytest.raises(ConfigError, match='no pair "r"; it has: p, q'):
        evaluate("--config", file, "--data", data, "--pair", "r")
    out = tmp_path / "out"
    arguments = ("--config", file, "--data", data, "--rounds", "0")
    found = report(*arguments, "--pair", "p", "--alphas", "0", "-o", out)
    loop = Loop(oracle, target, expert, anti)
    prompts = dict.fromkeys((target, expert, anti), prompt(loop.tokenizer, TEXTS[0]))
    expected = oracle.greedy(lambda m, e, a: a + 0.5 * (m - e), prompts, MAX_TOKENS, eos=3)
    first = json.loads((out / "answers.jsonl").read_text().splitlines()[0])
    assert first["texts"]["alpha 0"] == loop.said(expected) != first["texts"]["base"]
    assert found["variants"][-1]["argmax_changed"] > 0
    labels = [row["label"] for row in report(*arguments, "--pair", "q", "--alphas", "0,1")["variants"]]
    assert labels == ["base", "expert", "beta 0", "beta 1"]


def test_a_target_without_a_template_is_asked_plainly(
    config: Write, target: Path, expert: Path, anti: Path, tmp_path: Path, oracle: Oracle
) -> None:
    """And its answers end where --stop says; a guided model has no expert to show."""
    plain = tmp_path / "plain"
    shutil.copytree(target, plain)
    (plain / "chat_template.jinja").unlink()
    file = config(speculation="")
    text = (
        file.read_text().replace(str(target), str(plain)).replace(f'expert = "{expert}"', 'mode = "cfg"', 1)
    )
    file.write_text(text.replace(f'anti_expert = "{anti}"', 'anti_expert = "self"\nanti_prompt = ""'))
    tokenizer = load_tokenizer(plain)
    ids = tokenizer.encode(TEXTS[0])
    prompts = [(plain, ids), (target, ids[-1:])]  # the same weights under two prompts
    output = oracle.greedy(lambda m, a: m + 1.5 * (m - a), dict(prompts), MAX_TOKENS, eos=3)
    expected = tokenizer.decode(output)
    data, out = write_task(tmp_path / "task.jsonl", [expected, "x", "x", "x"]), tmp_path / "out"
    arguments = ("--config", file, "--data", data, "--alphas", "1.5", "--rounds", "0")
    found = report(*arguments, "-o", out)
    assert [row["label"] for row in found["variants"]] == ["base", "alpha 1.5"]
    assert found["variants"][1]["tasks"]["a"]["right"] == 1
    stop = expected[2]
    stopped = tmp_path / "stopped"
    report(*arguments, "--stop", stop, "-o", stopped)
    said = json.loads((stopped / "answers.jsonl").read_text().splitlines()[0])["texts"]
    assert said["alpha 1.5"] == expected.split(stop)[0]


def test_what_cannot_be_measured_is_refused_in_a_line(
    config: Write, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    data = write_task(tmp_path / "task.jsonl", ["x"] * 4)
    file = config()
    arguments = ("--config", file, "--data", data)
    with pytest.raises(ConfigError, match='has no model "other"; it steers: steered-tiny'):
        evaluate(*arguments, "--model", "other")
    with pytest.raises(ConfigError, match='"0,x" is not a list'):
        evaluate(*arguments, "--alphas", "0,x")
    with pytest.raises(ConfigError, match=r'5 is outside the limits \[0, 4\] of pair "p"'):
        evaluate(*arguments, "--alphas", "1,5")
    with pytest.raises(ConfigError, match="same value twice"):
        evaluate(*arguments, "--alphas", "1,1.0")
    with pytest.raises(
        ConfigError, match=r"task.jsonl:1: the prompt has \d+ tokens, which with --max-tokens 510"
    ):
        evaluate(*arguments, "--max-tokens", "510")
    with pytest.raises(ArtifactError, match="tuned model's tokenizer"):
        evaluate(*arguments, *FAST, "--tuned", tiny_checkpoint("llama", vocab_size=280))
    unsteered = tmp_path / "plain.toml"
    unsteered.write_text('[[models]]\ntarget = "x"\n')
    with pytest.raises(ConfigError, match="steers no model"):
        evaluate("--config", unsteered, "--data", data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "task.jsonl:2: has no answer"),
        ('{"prompt": "a"', "task.jsonl:1: not JSON"),
        ('{"prompt": "a", "answer": "b", "task": "x", "category": "y"}', "both task and category"),
        ('{"prompt": "a", "answer": "none"}', "answer has no number"),
        ("", "holds no questions"),
    ],
)
def test_bad_lines_are_named(target: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    score: Any = "number" if "number" in message else "exact"
    with pytest.raises(DataError, match=message):
        read_questions(path, load_tokenizer(target), score, None)


def test_conversations_are_questions_too(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    said = {"role": "assistant", "content": "right"}
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in ([system, user, said], [user, said])))
    first, second = read_questions(path, load_tokenizer(target), "exact", None)
    assert first.messages == [system, user]
    assert second.messages == [user]
    assert first.answer == second.answer == "right"
    (only,) = read_questions(path, load_tokenizer(target), "exact", 1)
    assert only == first


@pytest.mark.parametrize(
    ("score", "text", "answer", "right"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "42.", "42", False),
        ("contains", "It is PARIS, of course", "Paris", True),
        ("contains", "It is Rome", "Paris", False),
        ("number", "3 + 4 makes 1,007.50 in all", "so 1007.5", True),
        ("number", "-3", "3", False),
        ("number", "it was 7, then 8", "7", False),
        ("number", "none", "7", False),
    ],
)
def test_answers_are_judged(score: Any, text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer, score) is right


def test_numbers_between_other_things() -> None:
    assert last_number("no number") is None
    assert last_number("5-3") == 3, "a sign after a digit is a minus between two numbers"


def test_a_gap_needs_a_better_tuned_model() -> None:
    assert gap_closed(0.6, 0.4, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.9, 0.4, 0.8) == pytest.approx(1.25)
    assert gap_closed(0.2, 0.4, 0.8) == pytest.approx(-0.5)
    assert gap_closed(0.6, 0.4, 0.4) is None
