"""Contenders as processes: both kinds answer, are paused and ended, and say why they died."""

import asyncio
import os
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_stand_ins import http_spec, pipe_spec

from paceline.clients import peer_transformers
from paceline.clients.peers import Contender, PeerError, contender
from paceline.clients.stats import Sample
from paceline.clients.workload import Prompt


def process_state(one: Contender) -> str:
    """The kernel's letter: T is stopped."""
    stat = Path(f"/proc/{one.process.pid}/stat").read_text(encoding="ascii")
    return stat.rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


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


def test_children_end_with_their_contender(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = f"""
        import subprocess, sys
        deaf = "from signal import *; signal(SIGTERM, SIG_IGN); print(1, flush=True); import time; time.sleep(99)"
        child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        child.stdout.readline()
        open({str(note)!r}, "w").write(str(child.pid))
        print("{{}}", flush=True)
        sys.stdin.read()
    """

    async def scenario() -> None:
        async with contender(pipe_spec(code=code)):
            pass

    asyncio.run(scenario())
    stat = Path(f"/proc/{note.read_text(encoding='ascii')}/stat")
    wait_for(lambda: not stat.exists() or " Z " in stat.read_text(encoding="ascii"))


def test_a_contender_that_dies_says_why() -> None:
    async def start() -> None:
        async with contender(pipe_spec("broken", "raise SystemExit('no such model')")):
            pass

    with pytest.raises(PeerError, match="broken ended with exit code 1: no such model"):
        asyncio.run(start())


def test_a_server_that_answers_nonsense_is_named() -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import scripted_server as s, time
        with s.ScriptedServer(lambda call: s.Reply({}), int(sys.argv[1])):
            time.sleep(600)
    """
    spec = http_spec("odd")

    async def start() -> None:
        async with contender(replace(spec, argv=(*spec.argv[:2], textwrap.dedent(code), *spec.argv[3:]))):
            pass

    with pytest.raises(PeerError, match=r"odd: .*/models lists no model"):
        asyncio.run(start())


def test_fields_of_a_spec_reach_the_server() -> None:
    spec = http_spec()
    code = spec.argv[2].replace('call.body["ignore_eos"] is True', 'call.body["temperature"] == 0.7')

    async def ask(fields: dict[str, float]) -> Sample:
        one = replace(spec, argv=(*spec.argv[:2], code, *spec.argv[3:]), fields=fields)
        async with contender(one) as running:
            return await running.ask(Prompt(text="Hi"), 2)

    assert asyncio.run(ask({"temperature": 0.7})).error is None
    with pytest.raises(PeerError):  # greedy by default; the stand-in takes nothing else than 0.7
        asyncio.run(ask({}))


def test_environment_variables_reach_the_contender() -> None:
    code = 'import os, sys; sys.exit("got " + os.environ["PEER_TEST"])'

    async def start() -> None:
        async with contender(replace(pipe_spec("env", code), env={"PEER_TEST": "it"})):
            pass

    with pytest.raises(PeerError, match="got it"):
        asyncio.run(start())


def test_the_transformers_worker_times_every_token(tiny_checkpoint: Callable[..., Path]) -> None:
    lm, tokenizer = peer_transformers.load(tiny_checkpoint("llama"), "bf16")
    assert str(lm.dtype) == "torch.bfloat16"
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    reply = peer_transformers.answer(lm, tokenizer, request)
    assert len(reply["times_s"]) == 9  # end-of-sequence does not stop it
    assert reply["times_s"] == sorted(reply["times_s"])
    assert reply["times_s"][0] > 0
    assert reply["prompt_tokens"] > 2
