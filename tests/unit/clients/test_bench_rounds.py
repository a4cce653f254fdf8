"""The order of the side-by-side bench: alternation, pausing or restarting, failures."""

import asyncio

import pytest
from bench_stand_ins import bench_plan, http_spec, pipe_spec

from paceline.clients import bench_rounds
from paceline.clients.bench_presets import Plan
from paceline.clients.bench_rounds import Rounds
from paceline.clients.bench_scenarios import Scenario
from paceline.clients.peer_report import Board, Key
from paceline.clients.peers import Contender, PeerError, Spec
from paceline.clients.traffic import ClosedLoop


def measure(specs: list[Spec], plan: Plan) -> Board:
    board = Board()
    asyncio.run(Rounds(specs, plan, board).run())
    return board


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rounds, "busy_share", lambda: 0.0)


@pytest.mark.parametrize("restart", [False, True])
def test_rounds_alternate_and_everyone_runs_alone(monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    turns: list[tuple[str, int]] = []
    processes = set()
    original = bench_rounds.take_turn

    async def spy(one: Contender, plan: Plan, board: Board, number: int) -> None:
        turns.append((one.spec.name, number))
        processes.add(one.process.pid)
        await original(one, plan, board, number)

    monkeypatch.setattr(bench_rounds, "take_turn", spy)
    board = measure([http_spec(), pipe_spec("a"), pipe_spec("b")], bench_plan(restart=restart))
    assert turns == [("a", 1), ("b", 1), ("ours", 1), ("b", 2), ("ours", 2), ("a", 2)]
    assert len(processes) == (6 if restart else 3)
    # pipes take one stream
    assert set(board.figures) == {
        Key("a", "short", 1),
        Key("b", "short", 1),
        Key("ours", "short", 1),
        Key("ours", "short", 2),
    }
    for key, rounds in board.figures.items():
        assert [stats.requests for stats in rounds] == [2 * key.streams] * 2
        assert all(stats.errors == 0 and stats.output_tokens == 4 * stats.requests for stats in rounds)


def test_scenarios_are_measured_apart() -> None:
    scenarios = [Scenario("short", (ClosedLoop(1),)), Scenario("long", (ClosedLoop(2),))]
    board = measure([http_spec()], bench_plan(rounds=1, scenarios=scenarios))
    assert list(board.figures) == [Key("ours", "short", 1), Key("ours", "long", 2)]


@pytest.mark.parametrize("restart", [False, True])
def test_a_peer_that_fails_is_left_out_but_ours_is_not(restart: bool) -> None:
    dies_when_asked = 'import sys; print("{}", flush=True); sys.stdin.readline(); sys.exit("out of memory")'
    broken = [pipe_spec("early", "raise SystemExit('gone')"), pipe_spec("late", dies_when_asked)]
    board = measure([http_spec(), *broken], bench_plan(restart=restart))
    assert len(board.skipped) == 2
    said = " / ".join(board.skipped)
    assert "early ended with exit code 1: gone" in said
    assert "late ended with exit code 1: out of memory" in said
    assert len(board.figures[Key("ours", "short", 1)]) == 2
    with pytest.raises(PeerError, match="mine ended"):
        measure([pipe_spec("mine", "raise SystemExit(3)", family="ours")], bench_plan(restart=restart))


def test_a_busy_machine_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rounds, "busy_share", lambda: 0.5)
    board = measure([http_spec()], bench_plan(rounds=1))
    assert board.busy_share == 0.5
    assert "WARNING" in capsys.readouterr().err
