"""The command of the side-by-side bench: what it prints, stores and refuses."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench_stand_ins import http_spec, pipe_spec

from paceline.clients import bench_peers, bench_rounds, peer_files
from paceline.clients.bench_presets import Plan
from paceline.clients.ceiling import Bandwidth
from paceline.clients.peers import PeerError, Spec
from paceline.clients.workload import UsageError

typer = pytest.importorskip("typer")


class StubCast:
    """Stand-ins instead of servers; remembers the plan."""

    plans: ClassVar[list[Plan]] = []

    def __init__(self, plan: Plan, _model: Path, skip: Any) -> None:
        StubCast.plans.append(plan)
        skip("vllm: not here")

    def ours(self) -> list[Spec]:
        return [http_spec()]

    def peers(self) -> list[Spec]:
        return [pipe_spec("peer")]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_rounds, "busy_share", lambda: 0.5)
    monkeypatch.setattr(bench_peers, "read_bandwidth", lambda: Bandwidth(2e9, "kernels"))
    monkeypatch.setattr(bench_peers, "Cast", StubCast)
    monkeypatch.setattr(StubCast, "plans", [])
    monkeypatch.chdir(tmp_path)


def run(tmp_path: Path, **flags: Any) -> None:
    quick = {"concurrency": "1", "scenario": "short", "rounds": 1, "max_tokens": 3, "num_prompts": 1}
    bench_peers.bench_peers(**{"model": str(tmp_path), **quick, **flags})


def test_tables_json_and_the_result_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(tmp_path, out=tmp_path / "result.json")
    printed, said = capsys.readouterr()
    record = json.loads(printed.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == record
    assert [row["contender"] for row in record["rows"]] == ["peer", "ours"]
    assert record["rows"][1]["ceiling_tok_s"] == 2e9 / 200
    assert record["rows"][0]["ours_over_it"]["ours"] > 0
    assert [(r["over"], r["figure"]) for r in record["ours_over_best"]] == [
        ("peer", "output_tok_s"),
        ("peer", "prefill_tok_s"),
    ]
    assert record["machine"]["busy_share"] == 0.5
    assert record["machine"]["read_measured_with"] == "kernels"
    assert record["versions"]["vllm"] == "not given"
    assert (record["preset"], record["ended_early"]) == ("smollm2", None)
    assert "Ours over the best of each" in printed
    assert "Not measured: vllm: not here" in printed
    assert "read bandwidth 2.0 GB/s" in said


def test_a_checkout_keeps_results_by_date_and_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(tmp_path)
    assert "not stored" in capsys.readouterr().err
    (tmp_path / bench_peers.RESULTS).mkdir(parents=True)
    run(tmp_path, quick=True)
    (stored,) = (tmp_path / bench_peers.RESULTS).iterdir()
    record = json.loads(stored.read_text(encoding="utf-8"))
    assert stored.name == f"{record['date'][:10]}-smollm2-quick.json"
    with pytest.raises(typer.Exit) as ended:
        run(tmp_path, out=tmp_path / "no" / "folder.json")
    assert ended.value.exit_code == 2


def test_a_preset_and_what_overrides_it(tmp_path: Path) -> None:
    run(tmp_path, preset="qwen-pair", scenario=None, concurrency=None, draft="mine", quick=True, peers="vllm")
    (plan,) = StubCast.plans
    assert (plan.draft, plan.peers, plan.restart, plan.llamacpp_q8_0) == ("mine", ("vllm",), True, False)
    assert plan.serve[2] == ["--weights", "int8", "--draft", "mine"]
    assert [scenario.name for scenario in plan.scenarios] == ["short", "long"]
    assert (plan.rounds, plan.max_tokens) == (1, 32)
    run(tmp_path, serve=["--weights bf16 --draft ngram"], restart=True)
    assert StubCast.plans[1].serve == [["--weights", "bf16", "--draft", "ngram"]]
    assert StubCast.plans[1].restart


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (PeerError("ours died"), 1)])
def test_what_was_measured_is_kept_when_the_run_breaks_off(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    raised: Any,
    code: int,
) -> None:
    original = bench_rounds.take_turn

    async def second_round_breaks(one: Any, plan: Any, board: Any, number: int) -> None:
        if number == 2 and one.spec.name == "ours":
            raise raised
        await original(one, plan, board, number)

    monkeypatch.setattr(bench_rounds, "take_turn", second_round_breaks)
    with pytest.raises(typer.Exit) as ended:
        run(tmp_path, rounds=3, out=tmp_path / "result.json")
    assert ended.value.exit_code == code
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert record["ended_early"] in ("interrupted", "ours died")
    assert [row["contender"] for row in record["rows"]] == ["peer", "ours"]
    assert "Ended early" in capsys.readouterr().out


def test_bad_usage_and_a_model_that_cannot_be_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for flags in ({"concurrency": "x"}, {"preset": "x"}, {"scenario": "x"}, {"peers": "x"}):
        with pytest.raises(typer.Exit) as ended:
            run(tmp_path, **flags)
        assert ended.value.exit_code == UsageError.exit_code == 2
    complaint = "import sys; sys.exit('paceline: no model called nonsense')"
    monkeypatch.setattr(peer_files, "PACELINE", (sys.executable, "-c", complaint))
    with pytest.raises(typer.Exit) as ended:
        run(tmp_path, model="nonsense")
    assert ended.value.exit_code == 1
    assert "paceline pull nonsense: paceline: no model called nonsense" in capsys.readouterr().err


def test_a_gguf_file_that_is_none_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = tmp_path / "weights.gguf"
    wrong.write_bytes(b"GGU")
    for path, complaint in ((wrong, "not a GGUF file"), (tmp_path / "none.gguf", "No such file")):
        with pytest.raises(typer.Exit) as ended:
            run(tmp_path, gguf=path)
        assert ended.value.exit_code == 2
        assert f"--gguf {path}: {complaint}" in capsys.readouterr().err
    assert not StubCast.plans
    wrong.write_bytes(b"GGUF")
    run(tmp_path, gguf=wrong)
    assert StubCast.plans[0].gguf == wrong.resolve()
