"""The vLLM adapter over a scripted vLLM: text, stops, log-probabilities, life of requests and engine."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Recorder
from fake_engine import EOS_ID
from fake_llm import ClientError, DeadError, FakeLlm, ready_engine

from paceline.server.backends.vllm.engine import VllmEngine
from paceline.server.engine.interface import Load
from paceline.server.engine.request import Request, SamplingParams, SpeculationStats, TokenEvent
from paceline.server.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    PacelineError,
    QueueFullError,
    UnavailableError,
    UserError,
)

HELLO = [list(b"He"), list(b"llo"), list("wörld".encode())[:2], list("wörld".encode())[2:]]


def request(name: str = "r", n: int = 1, prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Request:
    return Request(name, "fake", prompt, SamplingParams(**{"max_tokens": 64, **sampling}), n=n)


def with_engine(llm: FakeLlm, test: Callable[[VllmEngine], Awaitable[Any]], **about: Any) -> Any:
    """Run ``test`` with a ready engine on one event loop, and stop it."""

    async def run() -> Any:
        engine = await ready_engine(llm, **about)
        try:
            return await test(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


def events_of(llm: FakeLlm, asked: Request, **about: Any) -> list[TokenEvent]:
    async def collect(engine: VllmEngine) -> list[TokenEvent]:
        return [event async for event in engine.submit(asked)]

    events: list[TokenEvent] = with_engine(llm, collect, **about)
    return events


def test_tokens_become_text_and_the_last_event_says_why() -> None:
    events = events_of(FakeLlm(HELLO), request())
    assert "".join(event.text for event in events) == "Hellowörld"
    assert "�" not in "".join(event.text for event in events)  # half a character is held back
    assert [token for event in events for token in event.token_ids] == [*b"Hello", *"wörld".encode(), EOS_ID]
    assert [event.finish_reason for event in events][-2:] == [None, "stop"]
    assert events[0].cached_tokens == 4


def test_a_stop_string_across_steps_ends_the_choice_and_aborts_it() -> None:
    llm = FakeLlm(HELLO)
    events = events_of(llm, request(stop=("llow",)))
    assert "".join(event.text for event in events) == "He"
    assert events[-1].finish_reason == "stop"
    assert llm.aborted == ["r-0"]
    assert "stop" not in vars(llm.asked["r-0"])  # vLLM hears nothing of it


def test_vllm_is_told_which_ids_end_a_choice_and_not_to_look_for_others() -> None:
    llm = FakeLlm(HELLO)
    events_of(llm, request(stop_token_ids=(ord("o"),)))
    assert llm.asked["r-0"].stop_token_ids == sorted([ord("o"), EOS_ID])
    assert llm.asked["r-0"].ignore_eos
    events = events_of(llm, request(stop_token_ids=(ord("o"),)))
    assert "".join(event.text for event in events) == "Hell"
    events_of(llm, request(ignore_eos=True, max_tokens=3))
    assert llm.asked["r-0"].stop_token_ids == []


def test_max_tokens_ends_with_length() -> None:
    events = events_of(FakeLlm(HELLO), request(max_tokens=3))
    assert "".join(event.text for event in events) == "Hel"
    assert events[-1].finish_reason == "length"


def test_choices_are_requests_with_seeds_of_their_own() -> None:
    llm = FakeLlm(HELLO)
    events = events_of(llm, request(n=3, seed=7, temperature=0.5))
    assert {event.choice for event in events} == {0, 1, 2}
    assert sum(event.finish_reason is not None for event in events) == 3
    seeds = [llm.asked[f"r-{choice}"].seed for choice in range(3)]
    assert len({7, *seeds}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    again = FakeLlm(HELLO)
    events_of(again, request("again", n=3, seed=7))
    assert seeds == [again.asked[f"again-{choice}"].seed for choice in range(3)]


def test_scoring_alone_generates_nothing() -> None:
    llm = FakeLlm(HELLO)
    (event,) = events_of(llm, request(max_tokens=0, logprobs=1, prompt_logprobs=1))
    assert llm.asked["r-0"].max_tokens == 1
    assert (event.token_ids, event.text, event.finish_reason) == ((), "", "length")
    assert event.prompt_logprobs is not None
    assert [entry.token_id for entry in event.prompt_logprobs] == [1, 2, 3]
    assert event.prompt_logprobs[0].logprob is None


def test_logprobs_are_the_token_and_exactly_the_most_likely() -> None:
    events = events_of(FakeLlm([list(b"He")]), request(logprobs=2))
    entries = [entry for event in events for entry in event.logprobs or ()]
    assert [entry.token_id for entry in entries] == [*b"He", EOS_ID]
    assert entries[0].logprob == -1.25
    assert entries[0].top == ((ord("H") + 1, -0.5), (ord("H") + 2, -1.0))  # without the token: it is third
    assert [e.logprobs for e in events_of(FakeLlm([list(b"He")]), request())] == [None, None]


def test_only_the_first_choice_scores_the_prompt() -> None:
    llm = FakeLlm(HELLO)
    events = events_of(llm, request(n=2, prompt_logprobs=0, logprobs=0))
    assert llm.asked["r-1"].prompt_logprobs is None
    assert [event.choice for event in events if event.prompt_logprobs] == [0]


def test_what_speculation_did_comes_with_the_end() -> None:
    llm = FakeLlm(HELLO)
    llm.spec_decode_metrics = SimpleNamespace(histogram=[1, 0, 2, 0], num_draft_tokens=9)
    draft = {"drafts": ("d",), "default_draft": "d", "max_draft_tokens": 3}
    events = events_of(llm, request(), **draft)
    assert events[-1].speculation == SpeculationStats(3, 9, 4, (1, 0, 2, 0))


def test_statistics_of_a_choice() -> None:
    seen = Recorder()
    events_of(FakeLlm(HELLO), request(), observer=seen)
    (stats,) = seen.requests
    assert stats.finished_reason == "stop"
    assert stats.queue_seconds == 0.25
    assert len(stats.inter_token_seconds) == len(b"Hello") + len(
        "wörld".encode()
    )  # the first token has no gap


def test_leaving_aborts_every_choice() -> None:
    llm, seen = FakeLlm(HELLO), Recorder()

    async def leave(engine: VllmEngine) -> None:
        stream = engine.submit(request(n=2))
        await anext(stream)
        assert engine.loads() == {"fake": Load(2, 0)}
        await stream.aclose()
        await stream.aclose()
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.loads() == {"fake": Load(0, 0)}

    with_engine(llm, leave, observer=seen)
    assert sorted(llm.aborted) == ["r-0", "r-1"]
    assert [stats.finished_reason for stats in seen.requests] == ["abort", "abort"]


def test_a_full_queue_refuses() -> None:
    llm = FakeLlm(HELLO)
    llm.hold.clear()

    async def fill(engine: VllmEngine) -> None:
        engine.submit(request("a", n=3))  # two run, one waits
        assert engine.loads() == {"fake": Load(2, 1)}
        with pytest.raises(QueueFullError):
            engine.submit(request("b"))

    with_engine(llm, fill, max_queued=1)


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    llm = FakeLlm(HELLO)
    llm.hold.clear()

    async def drain(engine: VllmEngine) -> list[TokenEvent]:
        stream = engine.submit(request())
        assert not await engine.drain(0.05)
        with pytest.raises(UnavailableError):
            engine.submit(request("late"))
        llm.hold.set()
        events = [event async for event in stream]
        assert await engine.drain(5)
        return events

    events = with_engine(llm, drain)
    assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("errored", "state", "error"), [(False, "stopped", UnavailableError), (True, "failed", EngineError)]
)
def test_stopping_ends_streams_and_processes(errored: bool, state: str, error: type[PacelineError]) -> None:
    """A core that has died is a failure to whoever still waits, also where stopping is the first to notice."""
    llm = FakeLlm(HELLO)
    llm.hold.clear()

    async def stop(engine: VllmEngine) -> None:
        stream = engine.submit(request())
        await asyncio.sleep(0)
        llm.errored = errored
        await engine.stop()
        assert engine.state == state
        with pytest.raises(error):
            await anext(stream)

    with_engine(llm, stop)
    assert llm.shut_down


def test_a_request_that_vllm_refuses_is_the_clients_fault_and_others_go_on() -> None:
    llm = FakeLlm(HELLO)
    llm.failure = ClientError("no  such\nthing")

    async def fail(engine: VllmEngine) -> None:
        with pytest.raises(InvalidRequestError, match="no such thing"):
            async for _ in engine.submit(request(n=2)):
                pass
        assert engine.state == "ready"
        llm.failure = None
        assert [event async for event in engine.submit(request("next"))]

    with_engine(llm, fail)


def test_a_dead_core_fails_the_engine() -> None:
    llm = FakeLlm(HELLO)
    llm.failure = DeadError("EngineCore encountered an issue")

    async def die(engine: VllmEngine) -> None:
        llm.errored = True
        assert engine.state == "failed"
        with pytest.raises(EngineError):
            engine.submit(request())

    async def die_running(engine: VllmEngine) -> None:
        with pytest.raises(EngineError):
            async for _ in engine.submit(request()):
                pass

    with_engine(llm, die_running)
    with_engine(llm, die)


def test_what_can_never_run_is_refused_at_once() -> None:
    async def ask(engine: VllmEngine) -> None:
        with pytest.raises(ContextLengthError, match="512 tokens, but the prompt has 512 and 1 more"):
            engine.submit(request(prompt=(1,) * 512, max_tokens=0))
        with pytest.raises(InvalidRequestError, match="empty"):
            engine.submit(request(prompt=()))

    with_engine(FakeLlm(HELLO), ask)


def test_loading_that_fails_or_is_given_up() -> None:
    killed: list[bool] = []

    async def load(connect: Callable[[], Any]) -> VllmEngine:
        return VllmEngine(connect, Recorder(), max_queued_requests=1, kill=lambda: killed.append(True))

    async def fails() -> None:
        def connect() -> Any:
            raise UserError("no model")

        engine = await load(connect)
        with pytest.raises(UnavailableError):
            engine.submit(request())
        with pytest.raises(UserError, match="no model"):
            await engine.start()
        assert engine.state == "failed"

    async def given_up() -> None:
        started = asyncio.Event()
        loop, release = asyncio.get_running_loop(), threading.Event()

        def connect() -> Any:
            loop.call_soon_threadsafe(started.set)
            release.wait(60)

        engine = await load(connect)
        task = asyncio.create_task(engine.start())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()

    asyncio.run(fails())
    assert not killed
    asyncio.run(given_up())
    assert killed
