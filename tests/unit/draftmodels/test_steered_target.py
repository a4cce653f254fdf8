"""A steered model as what drafts are made for: its teacher against transformers in float64, training, measuring."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from steered import FORMULAS, Oracle
from typer.testing import CliRunner

from paceline.clients import console
from paceline.draftmodels import teacher as teaching
from paceline.draftmodels.data.member_prompts import member_prompts
from paceline.draftmodels.data.prompts import read_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.evaluate.cli import app
from paceline.draftmodels.export import export_artifact
from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.targets import target_spec
from paceline.draftmodels.teacher import Teacher, TeacherRows
from paceline.server.errors import ConfigError, DataError
from paceline.server.models.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("own_cache")

Steered = Callable[..., str]
ALPHA = 1.5
RULED_OUT = -1e4


@pytest.fixture
def expert(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=1, num_hidden_layers=1)


@pytest.fixture
def anti(tiny_checkpoint: TinyCheckpoint) -> Path:
    """Knows fewer ids than the target."""
    return tiny_checkpoint("llama", seed=2, num_hidden_layers=1)


@pytest.fixture
def steered(target: Path, expert: Path, anti: Path, tmp_path: Path) -> Steered:
    """``steered(lines of the pair)`` -> a reference of a model in a file of two."""

    def write(*lines: str) -> str:
        path = tmp_path / "steered.toml"
        path.write_text(
            f"""
            [[models]]
            name = "plain"
            target = "{target}"
            [[models]]
            name = "tiny"
            target = "{target}"
            weights = "fp32"
            [[models.steering]]
            name = "p"
            expert = "{expert}"
            anti_expert = "{anti}"
            """
            + "\n".join(lines or (f"alpha = {ALPHA}",))
        )
        return f"{path}:tiny"

    return write


@pytest.fixture
def engine(steered: Steered) -> Callable[..., LocalEngine]:
    def make(*lines: str) -> LocalEngine:
        return LocalEngine(steered(*lines), threads=1, streams=3, device="cpu")

    return make


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


def sequences(*lengths: tuple[int, int], seed: int = 0) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    return [TokenSequence(tuple(random.integers(4, 300, n).tolist()), prompt) for n, prompt in lengths]


#: Among them an answer of nothing, one token in all, and one longer than a forward.
SEQUENCES = sequences((20, 7), (9, 1), (12, 12), (1, 1), (140, 33), (31, 30))


def expected(
    oracle: Oracle, one: TokenSequence, members: Sequence[tuple[Path, Sequence[int]]], formula: Any
) -> np.ndarray:
    """Log-probabilities of the combination, [answer tokens, vocab]; each member behind its own prompt."""
    said = [
        oracle.logits(path, [*prompt, *one.answer])[len(prompt) - 1 : -1][: one.answer_tokens]
        for path, prompt in members
    ]
    combined = torch.tensor(formula(*said))
    return np.asarray(combined.log_softmax(-1))


def check(rows: Sequence[TeacherRows], wanted: Sequence[np.ndarray]) -> None:
    for found, right in zip(rows, wanted, strict=True):
        torch.testing.assert_close(found.log_p.double(), torch.tensor(right), rtol=1e-3, atol=3e-3)


@pytest.fixture(autouse=True)
def small_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and chunks that cut sequences everywhere."""
    monkeypatch.setattr(teaching, "ROWS", 48)
    monkeypatch.setattr(teaching, "_CHUNK_ROWS", 5)


def test_the_teacher_is_the_combination(
    kernels: str, engine: Callable[..., LocalEngine], oracle: Oracle, target: Path, expert: Path, anti: Path
) -> None:
    local = engine()
    teacher = Teacher(local, None, dtype=torch.float32)
    wanted = [
        expected(
            oracle,
            one,
            [(path, one.tokens[: one.prompt_tokens]) for path in (target, expert, anti)],
            lambda m, e, a: FORMULAS["proxy"](m, e, a, ALPHA),
        )
        for one in SEQUENCES
    ]
    rows = teacher.rows(SEQUENCES)
    check(rows, wanted)
    again = teacher.rows(SEQUENCES)
    assert all(torch.equal(a.log_p, b.log_p) for a, b in zip(rows, again, strict=True))
    plain = Teacher(LocalEngine(target, weights="fp32", threads=1, device="cpu"), None).rows(SEQUENCES)
    for own, alone in zip(rows, plain, strict=True):
        torch.testing.assert_close(own.states, alone.states)  # what drafts read
    gap = max(
        float((a.log_p - b.log_p.float()).abs().max())
        for a, b in zip(rows, plain, strict=True)
        if len(a.log_p)
    )
    assert gap > 0.5, "or steering changes nothing here"


@pytest.mark.parametrize("prefix", [" so then", " " + "on and " * 9])
def test_members_read_their_own_prompts(
    kernels: str,
    prefix: str,
    engine: Callable[..., LocalEngine],
    oracle: Oracle,
    target: Path,
    expert: Path,
    anti: Path,
) -> None:
    """A prefix makes the expert's prompts longer; cut into forwards everywhere, no row is off by one."""
    local = engine(f'response_prefix = "{prefix}"')
    behind = local.tokenizer.encode(prefix, add_special_tokens=False)
    wanted = []
    for one in SEQUENCES:
        prompt = one.tokens[: one.prompt_tokens]
        members = [(target, prompt), (expert, (*prompt, *behind)), (anti, prompt)]
        wanted.append(expected(oracle, one, members, lambda m, e, a: m + (e - a)))
    check(Teacher(local, None, dtype=torch.float32).rows(SEQUENCES), wanted)


def test_a_conversation_is_found_again_in_its_tokens(
    engine: Callable[..., LocalEngine], steered: Steered, oracle: Oracle, target: Path, expert: Path
) -> None:
    """The anti-expert reads a system message, which needs the conversation."""
    local = engine('anti_prompt = "be dull"')
    turn = [{"role": "user", "content": "the onion"}]
    ids = local.tokenizer.apply_chat_template(turn)
    read = local.tokenizer.apply_chat_template([{"role": "system", "content": "be dull"}, *turn])
    assert member_prompts(ids, local.info) == (tuple(ids), tuple(read))
    with pytest.raises(DataError, match="not a conversation of one user turn"):
        Teacher(local, None).rows(SEQUENCES[:1])
    alone = local.generate([[5, 6]], temperature=0, max_tokens=8, seed=0, steered=False)[0].answer
    plain = LocalEngine(target, weights="fp32", threads=1, device="cpu")
    assert alone == plain.generate([[5, 6]], temperature=0, max_tokens=8, seed=0)[0].answer


def test_what_a_nucleus_rules_out_is_a_number(
    kernels: str, engine: Callable[..., LocalEngine], oracle: Oracle, target: Path, expert: Path, anti: Path
) -> None:
    """Its probability is 0, and losses stay finite: log_p is a number that fp16 holds."""
    local = engine('support = "expert_top_p"', "support_top_p = 0.5")
    (one,) = sequences((30, 5))
    (rows,) = Teacher(local, None).rows([one])
    said = oracle.logits(expert, one.tokens)[one.prompt_tokens - 1 : -1]
    p = np.asarray(torch.tensor(said).softmax(-1))
    order = np.argsort(-p, axis=-1)
    before = np.take_along_axis(p, order, -1).cumsum(-1) - np.take_along_axis(p, order, -1)
    allowed = np.zeros_like(p, dtype=bool)
    np.put_along_axis(allowed, order, before < 0.5, -1)
    log_p = rows.log_p.float()
    assert torch.equal(log_p > RULED_OUT / 2, torch.tensor(allowed))
    assert torch.isfinite(rows.log_p).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(log_p)), rtol=0, atol=5e-3)
    (few,) = Teacher(local, None, top_k=100).rows([one])
    assert few.log_rest is not None
    assert torch.isfinite(few.log_rest).all()


def test_the_target_writes_what_the_steered_model_says(
    kernels: str, engine: Callable[..., LocalEngine], oracle: Oracle, target: Path, expert: Path, anti: Path
) -> None:
    local = engine()
    prompts = [one.tokens[: one.prompt_tokens] for one in SEQUENCES[:2]]
    said = local.generate(prompts, temperature=0, max_tokens=10, seed=0)
    for prompt, found in zip(prompts, said, strict=True):
        members = dict.fromkeys((target, expert, anti), prompt)
        right = oracle.greedy(lambda m, e, a: FORMULAS["proxy"](m, e, a, ALPHA), members, 10, eos=3)
        assert list(found.answer) == right


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    words = ["one", "two three", "four", "on the sea", "here", "there it is", "is it", "at once"]
    path.write_text("".join(json.dumps({"prompt": word, "answer": "an answer"}) + "\n" for word in words))
    return path


TRAINING = (
    "--source target --init layers:0,1 --round-prompts 6 --answer-tokens 12 --batch-tokens 120 --held-out 2 "
    "--eval-tokens 8 --eval-rounds 1 --streams 4 --threads 1 --precision fp32 --lr 3e-3 --max-steps 40"
)
MEASURING = "--limit 4 --max-tokens 16 --max-draft-tokens 3 --temperature 0 --rounds 1 --threads 1 --json"


def train(target: str, run: Path, prompts: Path, *more: str) -> None:
    arguments = ["train-draft", target, "--prompts", str(prompts), "-o", str(run), *TRAINING.split(), *more]
    assert console.main(arguments) == 0


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def distance(local: LocalEngine, draft: Path, text: Sequence[TokenSequence]) -> float:
    """Mean KL(combination || draft)."""
    plain = draft.with_name("plain")
    export_artifact(draft, plain, standalone=True)
    alone = LocalEngine(plain, weights="fp32", threads=1, device="cpu")
    p, q = (
        torch.cat([row.log_p for row in Teacher(one, None, dtype=torch.float32).rows(text)])
        for one in (local, alone)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_draft_is_distilled_on_the_combination_and_serves_it(
    steered: Steered, target: Path, expert: Path, anti: Path, tmp_path: Path
) -> None:
    reference, prompts, run = steered(), write_prompts(tmp_path), tmp_path / "run"
    train(reference, run, prompts)
    manifest = read_manifest(run / "best")
    assert manifest is not None
    assert manifest.base.id == str(target)
    (note,) = manifest.extra["steering"]
    assert (note["name"], note["mode"], note["alpha"]) == ("p", "proxy", ALPHA)
    assert note["expert"] == str(expert)
    assert note["expert_sha256"] != note["anti_expert_sha256"]
    assert len(note["expert_sha256"]) == 64
    # As long for the target alone: that one knows less of the combination.
    train(str(target), tmp_path / "other", prompts, "--weights", "fp32")
    local = LocalEngine(reference, threads=1, streams=3, device="cpu")
    asked = [prompt.tokens for prompt in read_prompts(prompts, local.tokenizer)]
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    text = local.generate(asked, temperature=1, max_tokens=24, seed=5)
    own, others = (distance(local, one / "current", text) for one in (run, tmp_path / "other"))
    assert own < 0.95 * others

    found = evaluate_draft(reference, run / "best", prompts)
    assert found["setting"]["steering"][0]["name"] == "p"
    (greedy,) = found["temperatures"]
    assert greedy["same_text"] == {"equal": 4, "compared": 4}
    assert greedy["total"]["num_draft_tokens"] > 0
    # A draft never changes what comes out: it serves the plain target, too.
    (plain,) = evaluate_draft(str(target), run / "best", prompts, "--weights", "fp32")["temperatures"]
    assert plain["same_text"] == {"equal": 4, "compared": 4}


def test_a_run_does_not_go_on_with_another_teacher(
    steered: Steered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, run = steered(), tmp_path / "run"
    train(reference, run, write_prompts(tmp_path), "--max-steps", "2")
    assert console.main(["train-draft", reference, "-o", str(run), "--resume"]) == 0
    steered("alpha = 0.25")
    capsys.readouterr()
    assert console.main(["train-draft", reference, "-o", str(run), "--resume"]) == 2
    assert "is not steered as when" in capsys.readouterr().err


def evaluate_draft(target: str, draft: object, prompts: Path, *more: str) -> dict[str, Any]:
    arguments = ["draft", target, "--draft", str(draft), "--prompts", str(prompts), *MEASURING.split()]
    done = CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_expert_as_draft_is_measured_on_the_steered_model(steered: Steered, tmp_path: Path) -> None:
    found = evaluate_draft(steered(), "expert", write_prompts(tmp_path))
    assert found["setting"]["draft"] == "expert"
    assert set(found["temperatures"][0]["total"]["drafted_by_source"]) == {"expert"}
    with pytest.raises(ConfigError, match="no pair with an expert steers the model plain"):
        evaluate_draft(steered().replace(":tiny", ":plain"), "expert", write_prompts(tmp_path))
    with pytest.raises(ConfigError, match="--against expert: no pair with an expert"):
        evaluate_draft(
            steered().replace(":tiny", ":plain"), "ngram", write_prompts(tmp_path), "--against", "expert"
        )


def test_a_feature_draft_reads_the_bases_states(steered: Steered, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(steered(), run, write_prompts(tmp_path), "--init", "feature", "--max-steps", "3")
    found = evaluate_draft(steered(), run / "best", write_prompts(tmp_path))
    assert found["temperatures"][0]["same_text"] == {"equal": 4, "compared": 4}


def test_targets_are_references_or_models_of_a_file(steered: Steered, target: Path) -> None:
    assert target_spec(str(target)).target == str(target)
    assert target_spec("smollm2-135m-instruct").steering == ()
    reference = steered()
    assert [pair.name for pair in target_spec(reference).steering] == ["p"]
    path = reference.removesuffix(":tiny")
    with pytest.raises(ConfigError, match=r"several models; name one as .*:NAME: plain, tiny"):
        target_spec(path)
    with pytest.raises(ConfigError, match='no model "other"; it lists: plain, tiny'):
        target_spec(f"{path}:other")
    with pytest.raises(ConfigError, match="no file"):
        target_spec("missing.toml")
