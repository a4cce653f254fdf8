"""``paceline sparsify`` from the command line on a tiny model, checked against transformers."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.clients import console
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.prune.config import recipe_from
from paceline.draftmodels.prune.goal import Goal
from paceline.draftmodels.prune.inputs import LINEARS
from paceline.draftmodels.prune.text import Texts, read_texts
from paceline.draftmodels.prune.walk import Walk
from paceline.draftmodels.prune.wanda import wanda
from paceline.kernels.formats import Pattern
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.student import declaration
from paceline.server.models.tokenizer import load_tokenizer

SMALL = ["--samples", "10", "--held-out", "4", "--sequence-tokens", "48"]
SECOND_Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    words = "sea river stone bread light seven green music winter paper glass cloud field horse"
    lines = [
        {"prompt": f"what is {word}", "answer": f"{word} is a word, and {word[::-1]} is {word} backwards"}
        for word in words.split()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(target: Path, output: Path, text: Path, *more: str) -> int:
    return console.main(
        ["sparsify", str(target), "-o", str(output), "--calibration", str(text), *SMALL, *more]
    )


def texts_of(target: Path, text: Path) -> Texts:
    flags = {"calibration": str(text), "samples": "10", "held_out": "4", "sequence_tokens": "48"}
    return read_texts(recipe_from(flags), str(target), load_tokenizer(target), 512)


@pytest.mark.parametrize(
    ("method", "pattern", "values", "arch"),
    [
        ("sparsegpt", "unstructured", "fp32", "llama"),
        ("sparsegpt", "16:32", "int8", "llama"),
        ("wanda", "2:4", "bf16", "qwen2"),
        ("magnitude", "unstructured", "fp16", "qwen3"),
        ("sparsegpt", "2:4", "int8", "mistral"),
    ],
)
def test_the_artifact_is_sparse_whole_and_measured(
    tiny_checkpoint: Any,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    pattern: str,
    values: str,
    arch: str,
) -> None:
    target, output = tiny_checkpoint(arch), tmp_path / "student"
    options = ("--method", method, "--pattern", pattern, "--values", values, "--seed", "3", "--json")
    assert run(target, output, text, *options) == 0
    facts = json.loads(capsys.readouterr().out)
    artifact = NativeCheckpoint(output)
    manifest = artifact.manifest
    assert manifest.kind == "student"
    assert manifest.weights["value_dtype"] == values
    assert manifest.recipe["sparsify"]["method"] == method
    assert manifest.provenance["seed"] == 3
    (measured,) = manifest.measured
    assert measured["perplexity"] == facts["perplexity"]["pruned"] > 1
    assert measured["dataset"] == "talk.jsonl, held out"
    assert f"(parent {facts['perplexity']['dense']:.2f})" in declaration(manifest, output)
    assert facts["sparsity"] == 0.5
    assert len(facts["linears"]) == 2 * len(LINEARS)
    assert (output / "report.html").read_text().count("data:image/png") == 2
    for layer in range(2):
        for name in LINEARS:
            weight = artifact.tensor(f"model.layers.{layer}.{name}.weight").float()
            stored = artifact.sparse(f"model.layers.{layer}.{name}.weight")
            assert stored is not None
            assert stored.sparsity == 0.5
            assert str(stored.pattern) == pattern
            assert torch.isfinite(weight).all()
            assert not (torch.signbit(stored.values) & (stored.values == 0)).any() or values == "int8"
    head = "lm_head.weight"
    if head in artifact.tensor_names():
        assert (artifact.int8(head) is not None) == (values == "int8")


def test_perplexities_are_what_transformers_gives(
    target: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(target, tmp_path / "student", text, "--values", "int8", "--sparsity", "0.6", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    held_out = texts_of(target, text).held_out
    model = AutoModelForCausalLM.from_pretrained(target)
    assert facts["n_tokens"] == sum(s.answer_tokens for s in held_out) > 50
    assert facts["perplexity"]["dense"] == pytest.approx(perplexity(model, held_out), rel=1e-4)
    take_blocks(model, tmp_path / "student", range(2))  # its head stays the target's: see below
    assert facts["perplexity"]["pruned"] == pytest.approx(perplexity(model, held_out), rel=1e-4)
    assert facts["perplexity"]["pruned"] > facts["perplexity"]["dense"]


def test_a_block_is_calibrated_on_what_the_pruned_blocks_before_it_give(
    target: Path, tmp_path: Path, text: Path
) -> None:
    assert run(target, tmp_path / "student", text, "--method", "wanda", "--values", "fp32") == 0
    student = NativeCheckpoint(tmp_path / "student")
    stored = student.sparse(SECOND_Q)
    assert stored is not None
    texts, model = texts_of(target, text).calibration, AutoModelForCausalLM.from_pretrained(target)
    dense = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    from_dense = wanda(dense, squares_before(model, 1, texts), Goal(Pattern(), 0.5)).kept
    take_blocks(model, tmp_path / "student", range(1))
    from_pruned = wanda(dense, squares_before(model, 1, texts), Goal(Pattern(), 0.5)).kept
    assert torch.equal(stored.kept(), from_pruned)
    assert not torch.equal(stored.kept(), from_dense)


def take_blocks(model: Any, student: Path, layers: Sequence[int]) -> None:
    """Give a model some of a student's pruned blocks."""
    artifact = NativeCheckpoint(student)
    for layer in layers:
        for name in LINEARS:
            full = f"model.layers.{layer}.{name}.weight"
            with torch.no_grad():
                model.get_parameter(full).copy_(artifact.tensor(full))


@torch.no_grad()
def squares_before(model: Any, layer: int, texts: Sequence[TokenSequence]) -> Tensor:
    """Sums of squares of the inputs of a layer's q_proj, over all tokens but each text's last."""
    found: list[Tensor] = []
    hook = model.model.layers[layer].self_attn.q_proj.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0][0])
    )
    for sequence in texts:
        model(torch.tensor([sequence.tokens[:-1]]))
    hook.remove()
    return torch.cat(found).double().square().sum(0)


@torch.no_grad()
def perplexity(model: Any, texts: Sequence[TokenSequence]) -> float:
    nll, count = 0.0, 0
    for sequence in texts:
        logits = model(torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
        for at in range(sequence.prompt_tokens, len(sequence.tokens)):
            nll -= float(logits[at - 1, sequence.tokens[at]])
            count += 1
    return math.exp(nll / count)


def test_threads_and_repetition_change_nothing(target: Path, tmp_path: Path, text: Path) -> None:
    for name, threads in (("a", "1"), ("b", "2")):
        assert run(target, tmp_path / name, text, "--threads", threads) == 0
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_owl_spends_the_same_in_all(
    target: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--allocation",
        "owl",
        "--owl-lambda",
        "0.1",
        "--owl-outliers",
        "2",
        "--sparsity",
        "0.6",
        "--json",
    )
    assert run(target, tmp_path / "student", text, *options) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sparsity"] == pytest.approx(0.6, abs=1e-4)
    by_layer = [
        {round(f["sparsity"], 2) for f in facts["linears"] if f["layer"] == layer} for layer in range(2)
    ]
    assert sorted(min(found) for found in by_layer) == [0.5, 0.7]
    assert all(len(found) == 1 for found in by_layer)


def test_plain_text_and_another_file_to_measure_on(
    target: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("the sea is wide and the stone is old; " * 60)
    assert run(target, tmp_path / "student", book, "--measure", str(text), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured_on"] == "talk.jsonl"
    assert facts["recipe"]["calibration"] == "book.txt"


@pytest.mark.parametrize("chat", [True, False])
def test_the_target_writes_its_own_text(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    own = shutil.copytree(target, tmp_path / "model")
    if not chat:
        (own / "chat_template.jinja").unlink()
    options = ("--samples", "4", "--held-out", "2", "--sequence-tokens", "400", "--weights", "fp32", "--json")
    assert console.main(["sparsify", str(own), "-o", str(tmp_path / "student"), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured_on"] == "the target's own text, held out"
    assert facts["recipe"]["calibration"] == "self"
    assert facts["n_tokens"] > 4


def test_interrupted_it_leaves_nothing(
    target: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Walk._prune_block

    def interrupted(self: Walk, block: Any, layer: int, *rest: Any) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        original(self, block, layer, *rest)

    monkeypatch.setattr(Walk, "_prune_block", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(target, tmp_path / "student", text)
    assert stopped.value.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.jsonl"]
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pattern", "2-4"), 2, "--pattern: a pattern is 'unstructured' or n:m"),
        (("--pattern", "4:4"), 2, "--pattern: an n:m pattern needs 0 < n < m"),
        (("--pattern", "2:4", "--sparsity", "0.6"), 2, "--sparsity: 2:4 removes 0.5 of the weights, not 0.6"),
        (
            ("--pattern", "2:5", "--block-size", "100"),
            2,
            "--pattern: the 64 inputs of self_attn.q_proj are not whole",
        ),
        (
            ("--pattern", "2:4", "--block-size", "10"),
            2,
            "--block-size: 10 columns are not whole groups of 2:4",
        ),
        (("--sparsity", "1"), 2, "--sparsity: expected a number above 0 and at most 0.99"),
        (("--method", "obs"), 2, '--method: expected "sparsegpt", "wanda" or "magnitude"'),
        (("--method", "wanda", "--damping", "0.1"), 2, "--damping: only method sparsegpt has it"),
        (("--method", "magnitude", "--block-size", "64"), 2, "--block-size: only method sparsegpt"),
        (("--owl-lambda", "0.1"), 2, "--owl-lambda: only allocation owl has it"),
        (("--allocation", "owl", "--pattern", "2:4"), 2, "--allocation: every layer of 2:4 has the same"),
        (("--allocation", "owl", "--sparsity", "0.05"), 2, "--owl-lambda: 0.08 around a sparsity of 0.05"),
        (("--weights", "int8"), 2, "--weights: calibration text comes from"),
        (
            ("--sequence-tokens", "1000"),
            2,
            "--sequence-tokens: 1000 is more than the target's context of 512",
        ),
        (("--held-out", "14"), 1, "cannot hold out 14 of 14"),
        (("--measure", "nowhere.jsonl"), 1, "cannot read nowhere.jsonl"),
        (("--calibration", "nowhere.txt"), 1, "cannot read nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(
    target: Path,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    assert run(target, tmp_path / "student", text, *options) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (tmp_path / "student").exists()


def test_an_artifact_is_not_pruned_again(
    target: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(target, tmp_path / "student", text) == 0
    assert run(target, tmp_path / "student", text) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(target, tmp_path / "student", text, "--force", "--method", "wanda") == 0
    capsys.readouterr()
    assert run(tmp_path / "student", tmp_path / "again", text) == 2
    assert "name the dense model that it was made from" in capsys.readouterr().err
