"""``paceline bench`` against scripted servers: counts, pacing, errors, exit codes, the JSON line."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Call, Reply, ScriptedServer

from paceline.clients.console import main
from paceline.clients.load import Outcome, Plan, run_plan
from paceline.clients.stats import Sample
from paceline.clients.stream import Target
from paceline.clients.traffic import ClosedLoop, OpenLoop
from paceline.clients.workload import Prompt

MODELS = Reply({"data": [{"id": "served"}, {"id": "other"}]})
EVENT_DELAY_S = 0.004


def token_chunks(chat: bool, count: int, *, continuous: bool) -> list[dict[str, Any]]:
    """``count`` tokens, two per chunk, then the usage chunk."""
    events: list[dict[str, Any]] = []
    for done in range(2, count + 1, 2):
        finish = "length" if done == count else None
        content: dict[str, Any] = {"delta": {"content": "ab"}} if chat else {"text": "ab"}
        usage = {"completion_tokens": done, "prompt_tokens": 3} if continuous else None
        events.append({"choices": [{"index": 0, **content, "finish_reason": finish}], "usage": usage})
    return [*events, {"choices": [], "usage": {"completion_tokens": count, "prompt_tokens": 3}}]


def well_behaved(call: Call) -> Reply:
    """Streams ``max_tokens`` tokens with the usage that was asked for."""
    if call.body is None:
        return MODELS
    options = call.body.get("stream_options") or {}
    count = max(2, call.body["max_tokens"])
    continuous = options.get("continuous_usage_stats", False)
    events = token_chunks(call.path.endswith("/chat/completions"), count, continuous=continuous)
    return Reply(events=events if options.get("include_usage") else events[:-1], delay_s=EVENT_DELAY_S)


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``paceline bench``."""
    code = main(["bench", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_levels_run_in_order_with_every_option_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one", "max_tokens": 6}\n{"prompt": "two"}\n')
    with ScriptedServer(well_behaved) as server:
        flags = (
            "--concurrency",
            "1,3",
            "--prompts",
            str(prompts),
            "--num-prompts",
            "7",
            "--max-tokens",
            "10",
        )
        more = ("--temperature", "0.5", "--seed", "4", "--ignore-eos", "--warmup", "1", "--api-key", "secret")
        extra = ("--extra-body", '{"top_k": 5}', "--endpoint", "completions", "--model", "m")
        code, out, _ = bench(capsys, "--url", server.url, *flags, *more, *extra)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert [level["level"] for level in record["levels"]] == ["1", "3"]
    for level in record["levels"]:
        assert (level["requests"], level["errors"]) == (7, 0)
        assert level["output_tokens"] == 4 * 6 + 3 * 10  # the file's max_tokens wins for its prompt
        assert level["prompt_tokens"] == 7 * 3
        assert level["counted_by"] == ["continuous_usage"]
        # Two tokens to a chunk and a pause before each chunk: these cannot come out smaller.
        assert level["ttft_ms"]["p50"] >= EVENT_DELAY_S * 1000
        assert level["e2e_ms"]["p99"] >= level["e2e_ms"]["p50"] >= 3 * EVENT_DELAY_S * 1000
        assert level["request_tok_s"]["p99"] <= level["request_tok_s"]["p50"]
        assert 0 <= level["itl_ms"]["p50"] < level["e2e_ms"]["p50"]
        assert level["output_tok_s"] == pytest.approx(level["output_tokens"] / level["duration_s"], rel=0.01)
    assert "running count in each chunk" in out
    measured = [call.body for call in server.posts[2:]]  # after the probe and the warm-up
    assert len(server.posts) == 2 + 7 + 7
    assert server.peak <= 3
    assert measured[0] == {
        "model": "m",
        "prompt": "one",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 6,
        "temperature": 0.5,
        "seed": 4,
        "ignore_eos": True,
        "top_k": 5,
    }
    assert {call.headers["Authorization"] for call in server.posts} == {"Bearer secret"}
    assert {call.path for call in server.posts} == {"/v1/completions"}


def test_defaults_ask_the_chat_endpoint_of_the_first_model(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(well_behaved) as server:
        code, out, err = bench(
            capsys, "--url", server.url, "--num-prompts", "2", "--max-tokens", "2", "--json"
        )
    record = json.loads(out)  # nothing else on stdout
    assert code == 0
    assert record["bench"]["model"] == "served"
    assert "using 'served'" in err
    assert [level["level"] for level in record["levels"]] == ["1", "8"]
    assert {(call.path, call.body["temperature"]) for call in server.posts} == {("/v1/chat/completions", 0.0)}
    assert not {"seed", "ignore_eos"} & server.posts[-1].body.keys()


@pytest.mark.parametrize(
    ("refused", "counted_by", "tokens"),
    [(["continuous_usage_stats"], "usage", 8), (["continuous_usage_stats", "include_usage"], "chunks", 4)],
)
def test_token_counting_falls_back_to_what_the_server_accepts(
    capsys: pytest.CaptureFixture[str], refused: list[str], counted_by: str, tokens: int
) -> None:
    def script(call: Call) -> Reply:
        if call.body is not None and set(refused) & (call.body.get("stream_options") or {}).keys():
            return Reply({"error": {"message": "unknown option"}}, status=400)
        return well_behaved(call)

    with ScriptedServer(script) as server:
        flags = ("--concurrency", "1", "--num-prompts", "1", "--max-tokens", "8")
        code, out, _ = bench(capsys, "--url", server.url, *flags)
    (level,) = json.loads(out.splitlines()[-1])["levels"]
    assert code == 0
    assert (level["counted_by"], level["output_tokens"], level["errors"]) == ([counted_by], tokens, 0)
    assert ("as the server sends no usage" in out) == (counted_by == "chunks")


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    replies = {
        "refused": Reply({"error": {"message": "queue [full]"}}, status=429),
        "inside": Reply(events=[{"error": {"message": "engine failed"}}]),
        "cut": Reply(events=token_chunks(True, 2, continuous=True)[:1], cut=True),
        "early": Reply(events=[{"choices": [{"index": 0, "delta": {"content": "a"}}]}], done=False),
        "garbage": Reply(events=[b"data: {nonsense"]),
    }

    def script(call: Call) -> Reply:
        if call.body is None or call.body["max_tokens"] == 1:
            return well_behaved(call)
        return replies.get(call.body["messages"][0]["content"]) or well_behaved(call)

    with ScriptedServer(script) as server:
        target = Target(f"{server.url}/v1", "m", fields={"max_tokens": 4})
        prompts = [Prompt(text=text) for text in (*replies, "fine")]
        outcome = Outcome(target)
        asyncio.run(run_plan(Plan(target, [ClosedLoop(1)], prompts, warmup=0), outcome))
        bad = server.url, "--num-prompts", "2", "--concurrency", "1"
        server.script = lambda call: (
            well_behaved(call) if (call.body or {}).get("max_tokens") == 1 else replies["refused"]
        )
        code, out, _ = bench(capsys, "--url", *bad, "--model", "m", "--warmup", "0")
    (stats,) = outcome.levels
    assert (stats.requests, stats.errors, stats.output_tokens) == (6, 5, 4)
    messages = "\n".join(stats.error_messages)
    for part in ("HTTP 429: queue [full]", "inside the stream: engine failed", "without a finish_reason"):
        assert part in messages
    assert "is not JSON" in messages
    assert "RemoteProtocolError" in messages
    assert code == 1  # not one request succeeded
    assert "Error, 2 times: HTTP 429: queue [full]" in out


def test_closed_loop_keeps_exactly_the_given_number_in_flight() -> None:
    in_flight: list[int] = []
    waiting = 0

    async def scenario() -> list[Sample]:
        # Every round needs three requests at once to go on, so two workers would hang and four would show.
        together = asyncio.Barrier(3)

        async def send(prompt: Prompt) -> Sample:
            nonlocal waiting
            waiting += 1
            in_flight.append(waiting)
            async with asyncio.timeout(30):
                await together.wait()
            waiting -= 1
            return Sample(0.0, 0.0)

        return await ClosedLoop(3).run(send, [Prompt(text="x")] * 12, lambda sample: None)

    assert len(asyncio.run(scenario())) == 12
    assert max(in_flight) == 3


def test_open_loop_sends_without_waiting_for_answers() -> None:
    release = threading.Event()

    def script(call: Call) -> Reply:
        if call.body and call.body["max_tokens"] != 1:
            release.wait(30)
        return well_behaved(call)

    async def scenario(server: ScriptedServer) -> Outcome:
        target = Target(f"{server.url}/v1", "m", fields={"max_tokens": 2})
        outcome = Outcome(target)
        plan = Plan(target, [OpenLoop(rate=500.0, seed=1)], requests=5, warmup=0)
        task = asyncio.create_task(run_plan(plan, outcome))
        deadline = time.monotonic() + 30
        while server.in_progress < 5 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        release.set()
        await task
        return outcome

    with ScriptedServer(script) as server:
        (stats,) = asyncio.run(scenario(server)).levels
    assert server.peak == 5
    assert (stats.level, stats.requests, stats.errors) == ("500/s", 5, 0)


def test_open_loop_moments_follow_the_seed_and_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def moments(rate: float, seed: int) -> list[float]:
        now_s = 0.0
        sent: list[float] = []

        async def sleep(seconds: float) -> None:
            nonlocal now_s
            now_s += seconds

        async def send(prompt: Prompt) -> Sample:
            return Sample(0.0, 0.0)

        def arrived(prompts: int) -> Any:
            for _ in range(prompts):
                yield Prompt(text="x")
                sent.append(now_s)

        with monkeypatch.context() as patch:
            patch.setattr("paceline.clients.traffic.time.perf_counter", lambda: now_s)
            patch.setattr("paceline.clients.traffic.asyncio.sleep", sleep)
            asyncio.run(OpenLoop(rate, seed).run(send, arrived(2000), lambda sample: None))
        return sent

    assert moments(4.0, 1) == moments(4.0, 1) != moments(4.0, 2)
    assert moments(4.0, 1)[-1] == pytest.approx(2000 / 4.0, rel=0.1)  # standard error is 1/sqrt(2000) = 2.2%


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--concurrency", "0"], "--concurrency '0' is not a list of positive whole numbers"),
        (["--concurrency", "1,x"], "--concurrency '1,x'"),
        (["--rate", "0"], "--rate 0.0 is not a positive number"),
        (["--rate", "nan"], "--rate nan"),
        (["--rate", "1", "--concurrency", "1"], "exclude each other"),
        (["--url", "localhost:8000"], "--url 'localhost:8000' is not an address"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--extra-body", "[1]"], "--extra-body is not a JSON object"),
        (["--endpoint", "responses"], "responses"),
        (["--prompts", "/nonexistent/prompts.txt"], "/nonexistent/prompts.txt: No such file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], problem: str
) -> None:
    code, out, err = bench(capsys, *argv)
    assert (code, out) == (2, "")
    assert problem in err
    assert len(err.strip().splitlines()) == 1


def test_a_server_that_cannot_be_used_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(lambda call: Reply({"error": {"message": "wrong key"}}, status=401)) as server:
        code, _, err = bench(capsys, "--url", server.url, "--model", "m")
        assert (code, len(err.strip().splitlines())) == (1, 1)
        assert "HTTP 401: wrong key" in err
        url = server.url
    code, _, err = bench(capsys, "--url", url)
    assert code == 1
    assert "ConnectError" in err


#: Python leaves an inherited "ignore" of Ctrl-C alone, and test runs in the background inherit one.
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from paceline.clients.console import main; sys.exit(main())"
)


def test_ctrl_c_reports_the_levels_that_were_finished() -> None:
    release = threading.Event()

    def script(call: Call) -> Reply:
        if server.in_progress == 2:  # only the second level has two requests in flight
            second_level.set()
        if second_level.is_set():
            release.wait(60)
        return well_behaved(call)

    second_level = threading.Event()
    with ScriptedServer(script) as server:
        flags = (
            "--concurrency",
            "1,2",
            "--num-prompts",
            "2",
            "--max-tokens",
            "2",
            "--warmup",
            "0",
            "--model",
            "m",
        )
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE, "bench", "--url", server.url, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second_level.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        release.set()
    record = json.loads(out.splitlines()[-1])
    assert (process.returncode, record["interrupted"]) == (130, True)
    assert [level["level"] for level in record["levels"]] == ["1"]
    assert "interrupted" in err
    assert "Traceback" not in err
