"""The side-by-side bench with stand-ins for the contenders: order, pausing, ratios, ceilings, failures."""

import asyncio
import json
import os
import struct
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_server

from paceline.clients import bench_peers, peer_transformers, peers
from paceline.clients.ceiling import Weights, read_bandwidth, read_weights
from paceline.clients.peer_report import Board, busy_share, versions
from paceline.clients.peers import Contender, PeerError, Spec, contender
from paceline.clients.stats import Sample, summarize
from paceline.clients.traffic import ClosedLoop
from paceline.clients.workload import Prompt, UsageError

#: A worker that answers like ``peer_transformers``, at once.
PIPE_WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    times = [0.5 + 0.25 * i for i in range(request["max_tokens"])]
    print(json.dumps({"prompt_tokens": len(request["messages"]), "times_s": times}), flush=True)
"""

#: A server that answers like ``paceline serve``, at once.
HTTP_WORKER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import scripted_server as s
def script(call):
    if call.path == "/ready":
        return s.Reply({})
    if call.body is None:
        return s.Reply({"data": [{"id": "served"}]})
    assert call.body["ignore_eos"] is True and call.body["model"] == "served"
    count = call.body["max_tokens"]
    events = [{"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
               "usage": {"completion_tokens": i + 1, "prompt_tokens": 2}} for i in range(count)]
    events[-1]["choices"][0]["finish_reason"] = "length"
    return s.Reply(events=events)
with s.ScriptedServer(script, int(sys.argv[1])):
    time.sleep(600)
"""


def pipe_spec(name: str = "pipe", code: str = PIPE_WORKER) -> Spec:
    return Spec(name, (sys.executable, "-c", textwrap.dedent(code)), "fp32", max_concurrency=1)


def http_spec(name: str = "ours") -> Spec:
    port = peers.free_port()
    helpers = str(Path(scripted_server.__file__).parent)
    argv = (sys.executable, "-c", textwrap.dedent(HTTP_WORKER), str(port), helpers)
    return Spec(name, argv, "bf16", port=port, ready_path="/ready")


def process_state(one: Contender) -> str:
    """The kernel's letter: T is stopped."""
    stat = Path(f"/proc/{one.process.pid}/stat").read_text(encoding="ascii")
    return stat.rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def options(**changes: Any) -> bench_peers.Options:
    given: dict[str, Any] = {
        "serve": [["--weights", "bf16"]],
        "gguf": None,
        "levels": [ClosedLoop(1), ClosedLoop(2)],
        "rounds": 2,
        "max_tokens": 4,
        "requests": 1,
    }
    return bench_peers.Options(**{**given, **changes})


def test_both_kinds_of_contender_answer_with_figures() -> None:
    async def scenario() -> tuple[Sample, Sample]:
        async with contender(pipe_spec()) as pipe, contender(http_spec()) as http:
            prompt = Prompt(messages=[{"role": "user", "content": "Hi"}])
            return await pipe.ask(prompt, 3), await http.ask(prompt, 5)

    piped, served = asyncio.run(scenario())
    assert (piped.ttft_s, piped.token_gaps) == (0.5, ((0.25, 1.0), (0.25, 1.0)))
    assert (piped.output_tokens, piped.prompt_tokens, piped.error) == (3, 1, None)
    assert (served.output_tokens, served.prompt_tokens, served.error) == (5, 2, None)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_a_paused_contender_is_stopped_and_goes_on_where_it_was() -> None:
    async def scenario() -> int:
        async with contender(http_spec()) as one:
            one.pause()
            wait_for(lambda: process_state(one) == "T")
            one.resume()
            assert (await one.ask(Prompt(text="Hi"), 2)).output_tokens == 2
            one.pause()
            return one.process.pid

    pid = asyncio.run(scenario())  # ends although it was paused
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_contender_that_dies_says_why() -> None:
    async def start() -> None:
        async with contender(pipe_spec("broken", "raise SystemExit('no such model')")):
            pass

    with pytest.raises(PeerError, match="broken ended with exit code 1: no such model"):
        asyncio.run(start())


def test_rounds_alternate_and_everyone_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    original = bench_peers.take_turn

    async def spy(one: Contender, chosen: bench_peers.Options, board: Board, number: int) -> None:
        turns.append((one.spec.name, number))
        await original(one, chosen, board, number)

    monkeypatch.setattr(bench_peers, "take_turn", spy)
    monkeypatch.setattr(bench_peers, "busy_share", lambda: 0.0)
    board = Board()
    asyncio.run(bench_peers.compare([http_spec()], [pipe_spec("a"), pipe_spec("b")], options(), board))
    assert turns == [("a", 1), ("b", 1), ("ours", 1), ("b", 2), ("ours", 2), ("a", 2)]
    assert set(board.figures) == {
        ("a", "1"),
        ("b", "1"),
        ("ours", "1"),
        ("ours", "2"),
    }  # pipes take one stream
    for (_, level), rounds in board.figures.items():
        assert [stats.requests for stats in rounds] == [2 * int(level)] * 2
        assert all(stats.errors == 0 and stats.output_tokens == 4 * stats.requests for stats in rounds)


def test_a_peer_that_fails_is_left_out_but_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "busy_share", lambda: 0.0)
    dies_when_asked = 'import sys; print("{}", flush=True); sys.stdin.readline(); sys.exit("out of memory")'
    board = Board()
    broken = [pipe_spec("early", "raise SystemExit('gone')"), pipe_spec("late", dies_when_asked)]
    asyncio.run(bench_peers.compare([http_spec()], broken, options(), board))
    assert len(board.skipped) == 2
    assert "early ended with exit code 1: gone" in board.skipped[0]
    assert "late ended with exit code 1: out of memory" in board.skipped[1]
    assert len(board.figures["ours", "1"]) == 2
    with pytest.raises(PeerError, match="mine ended"):
        asyncio.run(bench_peers.compare([pipe_spec("mine", "raise SystemExit(3)")], [], options(), Board()))


def test_no_prompt_is_asked_twice() -> None:
    chosen = options(requests=40)
    asked = [
        prompt.body("chat")["messages"][0]["content"]
        for number in (1, 2)
        for level in chosen.levels
        for prompt in bench_peers.round_prompts(chosen, number, level)
    ]
    assert len(set(asked)) == len(asked) == 160


def test_ratios_are_medians_of_paired_rounds() -> None:
    board = Board(ceilings_tok_s={"ours": 200.0})
    for mine, its in ((100, 50), (90, 10), (80, 80)):  # ratios 2, 9, 1
        for name, tokens in (("ours", mine), ("peer", its)):
            board.add(name, summarize("1", [Sample(0.0, 1.0, 0.5, ((0.1, 1.0),), tokens)]))
    ours, peer = board.rows(["ours"])
    assert peer["ours_over_it"] == {"ours": 2.0}
    assert ours["ours_over_it"] == {}
    assert (ours["output_tok_s"], ours["share_of_ceiling"]) == (90.0, 0.45)
    assert (peer["ttft_ms_p50"], peer["itl_ms_p50"], peer["share_of_ceiling"]) == (500.0, 100.0, None)
    assert board.ratio("ours", "absent", "1") is None


def test_weights_of_a_tied_and_an_untied_folder(tmp_path: Path) -> None:
    def write(**shapes: list[int]) -> Weights:
        offset, header = 0, {}
        for name, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            key = name.replace("__", ".")
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {}, **header}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
        return read_weights(tmp_path)

    tied = write(model__embed_tokens__weight=[10, 4], layer=[4, 4])
    assert (tied.elements, tied.stored_bytes) == (56, 112)
    untied = write(model__embed_tokens__weight=[10, 4], layer=[4, 4], lm_head__weight=[10, 4])
    assert untied == tied  # the table that is only looked up is not read
    assert (tied.bytes_in("fp32"), tied.bytes_in("int4"), tied.bytes_in("stored")) == (224, 28, 112)


def test_weights_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in (("token_embd.weight", (10, 4)), ("output.weight", (10, 4)), ("blk", (4, 4))):
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_weights(tmp_path / "m.gguf") == Weights(elements=56, stored_bytes=112)


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("paceline.clients.ceiling.BUFFER_BYTES", 1 << 20)
    readings = iter([0.0, 4.0, 10.0, 12.0])  # two passes: 4 s and 2 s
    monkeypatch.setattr("paceline.clients.ceiling.time.perf_counter", lambda: next(readings))
    assert read_bandwidth(threads=1, repeats=2) == (1 << 20) / 2.0


def test_machine_facts() -> None:
    assert versions()["paceline"] != "not installed"
    share = busy_share(0.05)
    assert share is None or 0 <= share <= 1


def test_specs_say_who_cannot_take_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: object())
    board = Board()
    ours, others = bench_peers.specs(
        options(serve=[["--weights", "int8"], []]), tmp_path / "m.Q4_1.gguf", board
    )
    assert [spec.name for spec in (*ours, *others)] == [
        "paceline --weights int8",
        "paceline",
        "llama.cpp Q4_1",
        "transformers bf16",
        "transformers fp32",
    ]
    assert [spec.weight_format for spec in ours] == ["int8", "unknown"]
    assert ours[0].argv[-2:] == ("--weights", "int8")
    assert others[0].argv[-1] == "2"  # a slot per stream
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None if name == "transformers" else object())
    _, others = bench_peers.specs(options(), tmp_path, board)
    assert others == []
    assert "--gguf" in board.skipped[0]
    assert "paceline[server]" in board.skipped[1]


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_peers, "busy_share", lambda: 0.5)
    monkeypatch.setattr(bench_peers, "read_weights", lambda path: Weights(100, 60))
    monkeypatch.setattr(bench_peers, "read_bandwidth", lambda: 2e9)
    monkeypatch.setattr(bench_peers, "specs", lambda *_: ([http_spec()], [pipe_spec("peer")]))
    out = tmp_path / "result.json"
    flags = {"concurrency": "1", "rounds": 1, "max_tokens": 3, "num_prompts": 1, "out": out}
    bench_peers.bench_peers(model=str(tmp_path), **flags)  # type: ignore[arg-type]
    printed, said = capsys.readouterr()
    record = json.loads(printed.splitlines()[-1])
    assert json.loads(out.read_text(encoding="utf-8")) == record
    assert [row["contender"] for row in record["rows"]] == ["peer", "ours"]
    assert record["rows"][1]["ceiling_tok_s"] == 2e9 / 200
    assert record["rows"][0]["ours_over_it"]["ours"] > 0
    assert "ours / it" in printed
    assert "WARNING" in said
    assert record["machine"]["busy_share"] == 0.5
    assert "200 MB" not in said


def test_bad_usage_and_a_model_that_cannot_be_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typer = pytest.importorskip("typer")
    with pytest.raises(typer.Exit) as ended:
        bench_peers.bench_peers(concurrency="x")
    assert ended.value.exit_code == UsageError.exit_code == 2
    complaint = "import sys; sys.exit('paceline: no model called nonsense')"
    monkeypatch.setattr(peers, "PACELINE", (sys.executable, "-c", complaint))
    with pytest.raises(typer.Exit) as ended:
        bench_peers.bench_peers(model="nonsense")
    assert ended.value.exit_code == 1
    assert "paceline pull nonsense: paceline: no model called nonsense" in capsys.readouterr().err


def test_pull_takes_the_path_from_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print('fetching'); print('{\"path\": \"/somewhere/model.gguf\"}')"
    monkeypatch.setattr(peers, "PACELINE", (sys.executable, "-c", script))
    assert peers.pull("any") == Path("/somewhere/model.gguf")


def test_the_transformers_worker_times_every_token(tiny_checkpoint: Callable[..., Path]) -> None:
    lm, tokenizer = peer_transformers.load(tiny_checkpoint("llama"), "bf16")
    assert str(lm.dtype) == "torch.bfloat16"
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    reply = peer_transformers.answer(lm, tokenizer, request)
    assert len(reply["times_s"]) == 9  # end-of-sequence does not stop it
    assert reply["times_s"] == sorted(reply["times_s"])
    assert reply["times_s"][0] > 0
    assert reply["prompt_tokens"] > 2
