"""``paceline evaluate draft --against``: two drafts by turns within one run of the real engine, on tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from draft_evaluation import FAST, LENGTH, WHOLE_BLOCKS, check_sums, evaluate, report

from paceline.draftmodels.evaluate.answers import Pass
from paceline.draftmodels.evaluate.asking import Asker
from paceline.server.engine.interface import EventStream
from paceline.server.engine.native import NativeEngine
from paceline.server.engine.request import Request

pytestmark = pytest.mark.usefixtures("own_cache")


def test_another_draft_takes_turns_with_the_first_in_passes_of_several_streams(
    target: Path, near: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, passes = Asker.run, []

    async def noting(self: Asker, requests: Sequence[tuple[Request, str]], streams: int, label: str) -> Pass:
        ((model, speculates),) = {(request.model, request.speculation.enabled) for request, _ in requests}
        passes.append((label, model.endswith(" against"), speculates))
        return await run(self, requests, streams, label)

    monkeypatch.setattr(Asker, "run", noting)
    found = report(
        target, "--draft", target, "--against", near, "--prompts", prompts, "--max-tokens", WHOLE_BLOCKS,
        "--rounds", 2, "--temperature", 0, "--streams", 2,
    )  # fmt: skip

    assert passes == [
        ("T=0 acceptance", False, True),
        ("T=0 acceptance of the other draft", True, True),
        ("T=0 round 1/2 with", False, True),
        ("T=0 round 1/2 with the other", True, True),
        ("T=0 round 1/2 without", False, False),
        ("T=0 round 2/2 without", False, False),
        ("T=0 round 2/2 with the other", True, True),
        ("T=0 round 2/2 with", False, True),
    ]
    assert (found["setting"]["draft"], found["setting"]["against"]) == (str(target), str(near))
    assert found["setting"]["turns_within"] == "round"
    assert list(found["setting"]["weights_loaded"]) == ["target", "draft", "against"]
    (result,) = found["temperatures"]
    against = result["against"]
    check_sums(against["group"])
    assert result["total"]["tau"] == LENGTH + 1
    assert 1 < against["group"]["tau"] < LENGTH + 1
    assert len(against["ratios"]) == len(against["group"]["speed"]["rounds"]) == 2
    first, other = result["total"]["speed"]["rounds"], against["group"]["speed"]["rounds"]
    assert against["ratios"] == pytest.approx([a[0] / b[0] for a, b in zip(first, other, strict=True)])
    assert [a[1] for a in first] == [b[1] for b in other], "both are compared with the same passes without"
    assert result["same_text"] == {"equal": 4, "compared": 4}


def test_one_stream_takes_its_turns_within_each_prompt(
    target: Path, near: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, asked = NativeEngine.submit, []

    def noting(self: NativeEngine, request: Request) -> EventStream:
        speculates = "other" if request.model.endswith(" against") else "on"
        asked.append((request.prompt_ids, speculates if request.speculation.enabled else "off"))
        return submit(self, request)

    monkeypatch.setattr(NativeEngine, "submit", noting)
    found = report(
        target, "--draft", target, "--against", near, "--prompts", prompts, "--max-tokens", WHOLE_BLOCKS,
        "--rounds", 2, "--temperature", 0,
    )  # fmt: skip

    examined, timed = asked[: 2 * 4], asked[2 * 4 :]
    texts = [prompt for prompt, _ in examined[:4]]
    assert [prompt for prompt, _ in timed] == [text for text in (*texts, *texts) for _ in range(3)]
    there, back = ["on", "other", "off"], ["off", "other", "on"]
    assert [who for _, who in timed] == (there + back) * 2 + (back + there) * 2
    assert found["setting"]["turns_within"] == "prompt"
    (result,) = found["temperatures"]
    assert result["total"]["speed"]["tau"] == LENGTH + 1, "answers went to the variant that gave them"
    assert 1 < result["against"]["group"]["speed"]["tau"] < LENGTH + 1
    assert len(result["against"]["ratios"]) == 2
    assert result["same_text"] == {"equal": 4, "compared": 4}


def test_a_comparison_has_its_rows_in_table_and_picture(target: Path, near: Path, tmp_path: Path) -> None:
    done = evaluate(
        target, "--draft", "ngram", "--against", near, "--limit", 2, "--max-tokens", 6, "--rounds", 2,
        "--output", tmp_path / "out", *FAST[:-1],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"with draft ngram against {near}" in done.stdout
    lines = done.stdout.splitlines()
    assert sum(line.startswith("against ") for line in lines) == 2
    assert sum(line.startswith("  faster than the other draft:") and " +- " in line for line in lines) == 2
    assert (tmp_path / "out" / "report.png").exists()
    loaded = json.loads((tmp_path / "out" / "report.json").read_text())["setting"]["weights_loaded"]
    assert list(loaded) == ["target", "against"]
