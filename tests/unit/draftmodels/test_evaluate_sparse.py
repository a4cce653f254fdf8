"""``paceline evaluate sparse`` through the real engine, on tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from sparse_students import write_dense_twin, write_tiny_student
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.evaluate.cli import app
from paceline.draftmodels.evaluate.sparse import measure as measuring
from paceline.draftmodels.evaluate.sparse.plan import PARENT, STUDENT
from paceline.draftmodels.evaluate.sparse.speed import Run, Variant, summarize
from paceline.draftmodels.evaluate.sparse.text import MIN_CONTEXT_TOKENS, last_words, read_text
from paceline.server.errors import ArtifactError, ConfigError, DataError, ModelNotFoundError, UserError
from paceline.server.models.manifest import read_manifest
from paceline.server.models.student import declaration
from paceline.server.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = (
    "One day the old man went down to the shore and sat there for an hour. He said that he saw a ship! "
    'Then he asked: "Did you see it?" Nobody had, of course (they were all asleep.) The end of it'
)
LAST = ["hour", "ship", "it", "asleep"]
FAST = ("--weights", "fp32", "--threads", "1", "--limit", "2", "--max-tokens", "6")


@pytest.fixture
def student(target: Path, tmp_path: Path) -> Path:
    return write_tiny_student(tmp_path / "student", target, sparsity=0.6)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sparse", *map(str, arguments)], catch_exceptions=False)


def report(*arguments: object) -> dict[str, Any]:
    done = evaluate(*arguments, *FAST, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def oracle_logits(folder: Path, tokens: tuple[int, ...]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logits


def test_losses_are_those_of_an_independent_forward(
    kernels: str, target: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    found = report(student, "--text", text, "--rounds", 0)
    losses, size = found["losses"], found["size"]
    # The fp32 plan of the CPU kernels is dense.
    assert (size["bytes_per_forward"] < size["parent_bytes_per_forward"]) == (kernels == "torch")
    tokenizer = load_tokenizer(target)
    (sequence,) = read_text(str(text), tokenizer, 10_000, 512)
    twin = write_dense_twin(tmp_path / "twin", target, sparsity=0.6)
    parent, pruned = (oracle_logits(folder, sequence.tokens)[:-1] for folder in (target, twin))
    labels = torch.tensor(sequence.tokens[1:])
    expected = {
        "kl_nats": float((parent.exp() * (parent - pruned)).sum(-1).mean()),
        "perplexity": math.exp(-float(pruned.gather(1, labels[:, None]).mean())),
        "parent_perplexity": math.exp(-float(parent.gather(1, labels[:, None]).mean())),
        "top1_agreement": float((parent.argmax(-1) == pruned.argmax(-1)).float().mean()),
        "n_tokens": len(labels),
        "n_task": len(LAST),
    }
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=2e-3), name
    assert losses["kl_nats"] > 0.1
    assert losses["task"] == "last-word"


def test_a_student_that_lost_nothing(target: Path, tmp_path: Path, text: Path) -> None:
    """All weights kept: no loss, and the task is right where the parent is right."""
    same = write_tiny_student(tmp_path / "same", target, sparsity=0.0)
    found = report(same, "--text", text, "--rounds", 0)
    assert found["losses"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert found["losses"]["top1_agreement"] == 1.0
    assert found["losses"]["task_accuracy"] == found["losses"]["parent_task_accuracy"]
    assert found["speed"] == []
    assert found["size"]["sparsity"] == 0


def test_speed_size_and_files(target: Path, student: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = report(student, "--text", text, "--rounds", 2, "--draft", "ngram", "-o", out)
    variants = {one["variant"]: one for one in found["speed"]}
    assert list(variants) == ["parent", "student", "parent + draft", "student + draft"]
    assert all(len(one["rounds"]) == 2 and one["tokens_per_second"] > 0 for one in variants.values())
    assert variants["parent"]["over_parent"] == 1
    for model in ("parent", "student"):
        assert variants[f"{model} + draft"]["same_text"] == [2, 2], "speculation changes no text"
    size = found["size"]
    assert size["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert [layer["layer"] for layer in size["layers"]] == [0, 1]
    assert set(size["layers"][0]["linears"]) == {
        f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert found["setting"]["parent"] == str(target)
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="holds a report already"):
        evaluate(student, *FAST, "-o", out)


def test_the_table_for_people(student: Path, text: Path) -> None:
    done = evaluate(student, "--text", text, *FAST, "--rounds", 1)
    assert done.exit_code == 0
    for words in ("perplexity", "KL(parent || student)", "last-word accuracy", "MB per forward", "student"):
        assert words in done.output


def test_losses_are_recorded_once_per_setting(student: Path, text: Path) -> None:
    arguments = ("--text", text, "--rounds", 1, "--record")
    before = read_manifest(student)
    first = report(student, *arguments)
    report(student, *arguments)
    report(student, *arguments, "--text-tokens", 50)
    manifest = read_manifest(student)
    assert before is not None
    assert manifest is not None
    assert [entry["split"] for entry in manifest.measured] == [
        "held-out[:20000 tokens]",
        "held-out[:50 tokens]",
    ]
    entry = manifest.measured[0]
    assert entry["dataset"] == "text.txt"
    assert entry["kl_nats"] == pytest.approx(first["losses"]["kl_nats"], abs=1e-4)
    assert entry["speedup"] > 0
    assert f"KL {manifest.measured[1]['kl_nats']:.3f} nats" in declaration(manifest, student)
    assert manifest.base == before.base


def test_ctrl_c_reports_what_is_finished(student: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "time_rounds", interrupt)
    done = evaluate(student, "--text", text, *FAST, "--json", "--record")
    assert done.exit_code == 130
    found = json.loads(done.stdout)
    assert found["interrupted"]
    assert found["losses"]["kl_nats"] > 0
    assert found["speed"] == []
    manifest = read_manifest(student)
    assert manifest is not None
    assert manifest.measured == ()


def test_medians_and_ratios_within_a_round() -> None:
    def run(seconds: float, *answers: tuple[int, ...]) -> Run:
        return Run(answers, 100, seconds)

    parent, student = Variant(PARENT, False), Variant(STUDENT, False)
    rounds = [
        {parent: run(1.0, (1,)), student: run(0.5, (2,))},
        {parent: run(4.0, (1,)), student: run(1.0, (2,))},
        {parent: run(2.0, (1,)), student: run(2.0, (2,))},
    ]
    dense, sparse = summarize(rounds)
    assert (dense.tokens_per_second, dense.over_parent) == (50, 1)
    assert (sparse.tokens_per_second, sparse.over_parent) == (100, 2)
    assert sparse.same_text is None
    with_draft = {Variant(m, True): run(1.0, (1,)) for m in (PARENT, STUDENT)}
    assert [speed.same_text for speed in summarize([rounds[0] | with_draft])] == [None, None, (1, 1), (0, 1)]


@pytest.mark.parametrize("given", [1, 40])
def test_last_words(given: int, target: Path) -> None:
    tokenizer = load_tokenizer(target)
    tokens = tuple(tokenizer.encode(TEXT, add_special_tokens=False))
    sequence = TokenSequence(tokens, given)
    words = last_words(sequence, tokenizer)
    found = [tokenizer.decode(tokens[word.start : word.stop]).strip() for word in words]
    assert found == [word for word in LAST if TEXT.index(f" {word}") >= 0][-len(found) :]
    assert len(found) == len(LAST) - (given > MIN_CONTEXT_TOKENS and len(tokenizer.encode(TEXT[:74])) < given)
    assert all(word.start >= max(given, MIN_CONTEXT_TOKENS) for word in words)


def test_answers_of_a_file_count_and_prompts_do_not(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text('{"prompt": "hi", "answer": "the tree"}\n{"prompt": "no answer"}\n')
    tokenizer = load_tokenizer(target)
    (sequence,) = read_text(str(path), tokenizer, 100, 512)
    assert "the tree" in tokenizer.decode(sequence.answer)
    assert sequence.prompt_tokens > 1
    (cut,) = read_text(str(path), tokenizer, 2, 512)
    assert cut.answer == sequence.answer[:2]
    path.write_text('{"prompt": "no answer"}\n')
    with pytest.raises(DataError, match="holds no text to measure on"):
        read_text(str(path), tokenizer, 100, 512)


def test_what_cannot_be_measured_is_refused(
    target: Path, student: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    lost = write_tiny_student(tmp_path / "lost", target)
    manifest = json.loads((lost / "paceline.json").read_text())
    manifest["base"]["id"] = "/nowhere/parent"
    (lost / "paceline.json").write_text(json.dumps(manifest))
    other = tiny_checkpoint("llama", vocab_size=290)
    cases: list[tuple[tuple[Any, ...], type[UserError], str]] = [
        ((lost,), ModelNotFoundError, "parent /nowhere/parent is not found; name it with --parent"),
        ((target,), ConfigError, "name it with --parent"),
        ((target, "--parent", target, "--record"), ConfigError, "--record: .* has no paceline.json"),
        ((student, "--parent", other), ArtifactError, "tokenizer"),
        ((student, "--max-draft-tokens", 3), ConfigError, "does nothing without a --draft"),
        ((student, "--draft", "auto"), ConfigError, "name the draft"),
        ((student, "--text", tmp_path / "none.txt"), DataError, "cannot read"),
    ]
    for arguments, kind, says in cases:
        with pytest.raises(kind, match=says):
            evaluate(*arguments, *FAST)
    found = report(lost, "--parent", target, "--rounds", 0, "--text-tokens", 40)
    assert found["losses"]["n_tokens"] == 40


def test_another_parents_figures_are_told_apart(
    student: Path, tiny_checkpoint: TinyCheckpoint, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_checkpoint("llama", seed=9)
    report(student, "--parent", other, "--text", text, "--rounds", 0)
    assert "is not the file that the student was made of" in caplog.text
