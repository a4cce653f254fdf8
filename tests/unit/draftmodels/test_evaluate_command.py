"""``paceline evaluate draft`` through the real engine, on tiny models."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from draft_evaluation import FAST, LENGTH, WHOLE_BLOCKS, check_sums, evaluate, report
from native_drafts import write_draft, write_near_feature_draft

from paceline.clients import console
from paceline.draftmodels.cut import cut_draft
from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.server.models.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("own_cache")

Writer = Callable[[Path, Path], Path]


def write_draft_of_few_ids(folder: Path, target: Path) -> Path:
    """The target's own weights, but two thirds of its ids."""
    return write_draft(folder, target, target, ids=[i for i in range(300) if i % 3], int8=True)


def add(groups: Sequence[dict[str, Any]], key: str) -> int:
    return sum(group[key] for group in groups)


def test_a_draft_that_is_the_target_accepts_everything(target: Path, prompts: Path) -> None:
    found = report(
        target, "--draft", target, "--prompts", prompts, "--max-tokens", WHOLE_BLOCKS, "--rounds", 1
    )
    greedy, sampled = found["temperatures"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 1.0)
    for result in (greedy, sampled):
        total = result["total"]
        check_sums(total)
        assert total["alpha"] == pytest.approx(1, abs=1e-5)
        assert total["draft_acceptance_rate"] == 1.0
        assert {*total["alpha_per_position"]} == {1.0}
        assert total["speed"]["speedup"] > 0
    total = greedy["total"]
    assert total["n_tokens"] == 4 * WHOLE_BLOCKS, "an answer ended early: choose other prompts"
    assert total["tau"] == total["tau_formula"] == LENGTH + 1
    assert total["acceptance_histogram"] == [0, 0, 0, 16]
    assert greedy["same_text"] == {"equal": 4, "compared": 4}
    assert sampled["same_text"] is None
    assert found["setting"]["n_prompts"] == 4
    assert "fp32" in found["setting"]["weights_loaded"]["draft"]


def test_figures_of_a_cut_draft_agree_with_each_other(target: Path, prompts: Path, tmp_path: Path) -> None:
    cut_draft(str(target), [0], tmp_path / "cut")
    found = report(
        target, "--draft", tmp_path / "cut", "--prompts", prompts, "--max-tokens", 40, "--rounds", 2,
        "--streams", 3,
    )  # fmt: skip
    for result in found["temperatures"]:
        total, categories = result["total"], result["categories"]
        assert list(categories) == ["a", "b"]
        for group in (total, *categories.values()):
            check_sums(group)
            assert group["draft_acceptance_rate"] < 1
            assert 0 < group["alpha"] < 1
            assert group["tau"] < LENGTH + 1
            assert len(group["speed"]["rounds"]) == 2
        for key in ("n_prompts", "n_tokens", "target_forwards", "num_spec_steps", "num_draft_tokens"):
            assert add(list(categories.values()), key) == total[key]
        for position in range(LENGTH):
            overlap = total["overlap_per_position"][position]
            assert overlap is None or 0 <= overlap <= 1
    greedy = found["temperatures"][0]
    assert greedy["total"]["overlap_per_position"] == greedy["total"]["alpha_per_position"]
    assert greedy["same_text"] == {"equal": 4, "compared": 4}


def test_seeded_requests_have_no_overlap_but_the_same_text(target: Path, near: Path, prompts: Path) -> None:
    found = report(
        target, "--draft", near, "--prompts", prompts, "--max-tokens", 12, "--rounds", 1,
        "--temperature", 1, "--seed", 5,
    )  # fmt: skip
    (result,) = found["temperatures"]
    assert found["setting"]["seed"] == 5
    assert result["total"]["alpha"] is None
    assert result["total"]["draft_acceptance_rate"] > 0
    assert result["same_text"] == {"equal": 4, "compared": 4}


def test_the_adaptive_policy_and_ngrams(target: Path, near: Path, prompts: Path) -> None:
    for draft, policy in ((near, "adaptive"), ("ngram", "fixed")):
        found = report(
            target, "--draft", draft, "--prompts", prompts, "--max-tokens", 30, "--rounds", 0,
            "--temperature", 0, "--policy", policy,
        )  # fmt: skip
        (result,) = found["temperatures"]
        check_sums(result["total"])
        assert result["total"]["speed"] is None
        assert set(result["total"]["drafted_by_source"]) <= {"ngram", near.name}


@pytest.mark.parametrize("write", [write_draft_of_few_ids, write_near_feature_draft])
def test_drafts_in_native_form(write: Writer, target: Path, prompts: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "native", target)
    found = report(
        target, "--draft", folder, "--prompts", prompts, "--max-tokens", 20, "--rounds", 1, "--streams", 2
    )
    for result in found["temperatures"]:
        check_sums(result["total"])
        assert 0 < result["total"]["alpha"] < 1
    assert found["temperatures"][0]["same_text"] == {"equal": 4, "compared": 4}


def test_timed_passes_do_not_pay_for_looking(
    target: Path, near: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, wanted = BlockExaminer.take, []

    def noting(self: BlockExaminer, request_id: str) -> object:
        wanted.append(self.wants_overlaps)
        return take(self, request_id)

    monkeypatch.setattr(BlockExaminer, "take", noting)
    report(
        target, "--draft", near, "--prompts", prompts, "--max-tokens", 5, "--rounds", 1, "--temperature", 1
    )
    assert wanted == [True] * 4 + [False] * 8


def test_tables_fit_80_columns_and_files_are_written(target: Path, near: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = (target, "--draft", near, "--limit", 7, "--max-tokens", 6, "--rounds", 1, *FAST[:-1])
    done = evaluate(*arguments, "--output", output)
    assert done.exit_code == 0, done.output
    tables = [
        line for line in done.stdout.splitlines() if line.split(" ")[0] in ("category", "writing", "total")
    ]
    assert len(tables) == 2 * 3
    assert max(map(len, tables)) <= 80
    for word in (
        "T = 0",
        "T = 1",
        "writing",
        "knowledge",
        "total",
        "speed-up",
        "paceline-chat (held-out[:7])",
    ):
        assert word in done.stdout
    written = json.loads((output / "report.json").read_text())
    assert written["setting"]["dataset"] == "paceline-chat"
    assert {len(result["categories"]) for result in written["temperatures"]} == {6}
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")

    again = console.main(["evaluate", "draft", *map(str, arguments), "--output", str(output)])
    assert again == 2


def test_figures_go_into_the_manifest_and_replace_those_of_the_same_setting(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    cut_draft(str(target), [1], folder)
    raw = json.loads((folder / "paceline.json").read_text())
    other = {"dataset": "else", "alpha": 0.5, "mine": 1}
    (folder / "paceline.json").write_text(json.dumps(raw | {"measured": [other], "unknown": "kept"}))

    arguments = (
        target,
        "--draft",
        folder,
        "--prompts",
        prompts,
        "--max-tokens",
        8,
        "--rounds",
        1,
        "--record",
    )
    report(*arguments)
    found = report(*arguments)

    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.extra == {"unknown": "kept"}
    first, greedy, sampled = manifest.measured
    assert first == other
    total = found["temperatures"][0]["total"]
    assert greedy == {
        "dataset": "held-out.jsonl",
        "split": "held-out",
        "temperature": 0.0,
        "max_draft_tokens": LENGTH,
        "alpha": pytest.approx(total["alpha"], abs=1e-4),
        "tau": pytest.approx(total["tau"], abs=1e-4),
        "n_tokens": total["n_tokens"],
        "speedup": pytest.approx(total["speed"]["speedup"], abs=1e-4),
    }
    assert sampled["temperature"] == 1.0


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_reports_the_finished_rounds(
    target: Path, near: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in round 2 of the first temperature."""
    take, taken = BlockExaminer.take, []

    def interrupting(self: BlockExaminer, request_id: str) -> object:
        taken.append(request_id)
        if len(taken) == 3 * 4 + 2:
            signal.raise_signal(signal.SIGINT)
        return take(self, request_id)

    monkeypatch.setattr(BlockExaminer, "take", interrupting)
    done = evaluate(target, "--draft", near, "--prompts", prompts, "--max-tokens", 8, "--rounds", 3, *FAST)

    assert done.exit_code == 130
    found = json.loads(done.stdout)
    assert found["interrupted"]
    (result,) = found["temperatures"]
    assert len(result["total"]["speed"]["rounds"]) == 1
    assert "interrupted" in done.stderr


WRONG = [
    (("--draft", "no-such-draft"), 1, "no model named 'no-such-draft'"),
    (("--draft", "none"), 2, "--draft none leaves nothing to measure"),
    (("--draft", "ngram", "--against", "none"), 2, "--against none: no speculation is timed anyway"),
    (("--draft", "ngram", "--against", "auto"), 2, "--against auto: no draft comes with Paceline"),
    (("--draft", "ngram", "--against", "no-such-draft"), 1, "no model named 'no-such-draft'"),
    (("--draft", "ngram", "--temperature", "3"), 2, "--temperature 3 is not between 0 and 2"),
    (("--draft", "ngram", "--temperature", "1", "--temperature", "1"), 2, "names the same value twice"),
    (("--draft", "ngram", "--temperature", "0", "--seed", "1"), 2, "--seed does nothing at temperature 0"),
    (("--draft", "ngram", "--max-draft-tokens", "99"), 2, "--max-draft-tokens"),
    (("--draft", "ngram", "--weights", "int9"), 2, "--weights"),
    (("--draft", "ngram", "--prompts", "nowhere.jsonl"), 1, "cannot read nowhere.jsonl"),
    (("--draft", "ngram", "--record"), 2, "--record needs a draft model"),
    (("--draft", "ngram", "--record", "--streams", "2"), 2, "--record keeps figures of"),
    (("--draft", "ngram", "--policy", "eager"), 2, "--policy"),
    (("--draft", "ngram", "--max-tokens", "600", "--limit", "1"), 2, "exceed the context of 512"),
    ((), 2, "--draft"),
]


def test_the_group_alone_asks_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["evaluate"]) == 2
    assert capsys.readouterr().err == "paceline evaluate: Missing command. (see paceline evaluate --help)\n"


@pytest.mark.parametrize(("options", "code", "message"), WRONG)
def test_mistakes_are_one_line(
    target: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, message: str
) -> None:
    assert console.main(["evaluate", "draft", str(target), *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len([line for line in err.splitlines() if "paceline" in line]) == 1


def test_a_draft_of_another_tokenizer_is_refused(
    target: Path, tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_checkpoint("llama", vocab_size=310)
    assert console.main(["evaluate", "draft", str(target), "--draft", str(other)]) == 1
    assert "is not the target's" in capsys.readouterr().err


def test_a_draft_without_manifest_cannot_keep_figures(
    target: Path, near: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.main(["evaluate", "draft", str(target), "--draft", str(near), "--record"]) == 2
    assert "has no paceline.json" in capsys.readouterr().err
