"""The engine thread and its asyncio face: cancellation, queue limit, drain, failure."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engines import Recorder, ids, request, spec

from paceline.server.config.schema import EngineConfig, PacelineConfig
from paceline.server.engine.build import build_native
from paceline.server.engine.native import BuiltEngine, NativeEngine
from paceline.server.engine.request import Request, TokenEvent
from paceline.server.engine.stream import QueueStream
from paceline.server.errors import EngineError, ModelNotFoundError, QueueFullError, UnavailableError

pytestmark = pytest.mark.usefixtures("kernels")

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def build(tiny_checkpoint) -> Callable[[], BuiltEngine]:
    settings = EngineConfig(device="cpu", threads=1, kv_cache_gib=4 / 1024, block_size=16, max_running=4)
    config = PacelineConfig(engine=settings, models=(spec(tiny_checkpoint("llama"), draft="ngram"),))
    return lambda: build_native(config, Recorder())


async def collect(engine: NativeEngine, asked: Request) -> list[TokenEvent]:
    return [event async for event in engine.submit(asked)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_concurrent_requests_equal_their_solo_runs(build):
    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=100)
        await engine.start()
        asked = [request([5 + i, 6, 7], temperature=1.0, seed=i) for i in range(12)]
        together = await asyncio.gather(*(collect(engine, r) for r in asked))
        for r, events in zip(asked, together, strict=True):
            again = Request(r.id + "-solo", r.model, r.prompt_ids, r.sampling)
            assert ids(await collect(engine, again)) == ids(events)
        await engine.stop()
        assert engine.state == "stopped"

    asyncio.run(main())


def test_a_request_that_does_not_stream_gets_its_events_all_at_once(build):
    """The same ones; its event loop is left alone until then, whatever streams beside it."""

    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=100)
        await engine.start()
        streamed = request([5, 6, 7], n=2, max_tokens=40, ignore_eos=True, temperature=1.0, seed=3)
        whole = replace(streamed, id="whole", streams=False)
        expected = await collect(engine, streamed)
        stream, seen = engine.submit(whole), 0
        async for _ in engine.submit(replace(streamed, id="beside", n=1)):
            assert isinstance(stream, QueueStream)
            assert stream._queue.qsize() in (0, len(expected))
            seen += stream._queue.qsize() == 0
        assert seen > 5
        events = [event async for event in stream]
        for choice in range(2):
            assert ids([e for e in events if e.choice == choice]) == ids(
                [e for e in expected if e.choice == choice]
            )
        assert len(events) == len(expected) > 10
        await until(lambda: engine.kv_usage() == 0)
        await engine.stop()

    asyncio.run(main())


def test_closing_the_iterator_frees_everything_also_when_never_started_or_queued(build):
    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=100)
        await engine.start()
        streams = [engine.submit(request([5, 6, 7 + i], **LONG)) for i in range(10)]
        await anext(streams[0])
        await until(lambda: engine.loads()["m"].waiting > 0)
        for stream in streams:
            await stream.aclose()
        await until(lambda: engine.loads()["m"].running + engine.loads()["m"].waiting == 0)
        assert engine.kv_usage() == 0
        assert await collect(engine, request([5, 6, 7]))
        await engine.stop()

    asyncio.run(main())


def test_queue_limit_counts_waiting_choices(build):
    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=3)
        await engine.start()
        streams = [engine.submit(request([5, 6, 7], n=4, **LONG))]
        await anext(streams[0])
        await until(lambda: engine.loads()["m"].running == 4)
        streams += [engine.submit(request([5, 6, 7], **LONG)) for _ in range(3)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit(request([5, 6, 7]))
        assert caught.value.retry_after_seconds > 0
        for stream in streams:
            await stream.aclose()
        await until(lambda: engine.loads()["m"].running == 0)
        await collect(engine, request([5, 6, 7]))
        await engine.stop()

    asyncio.run(main())


def test_drain_finishes_what_runs_and_refuses_new(build):
    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=100)
        with pytest.raises(UnavailableError):
            engine.submit(request([5]))
        await engine.start()
        running = asyncio.create_task(collect(engine, request([5, 6, 7], max_tokens=100, ignore_eos=True)))
        await until(lambda: engine.loads()["m"].running == 1)
        draining = asyncio.create_task(engine.drain(20))
        await until(lambda: engine.state == "draining")
        with pytest.raises(UnavailableError) as caught:
            engine.submit(request([5]))
        assert caught.value.code == "draining"
        assert await draining
        assert len(ids(await running)) == 100
        await engine.stop()

    asyncio.run(main())


def test_drain_times_out_and_stop_ends_streams_with_an_error(build):
    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=100)
        await engine.start()
        stream = engine.submit(request([5, 6, 7], max_tokens=505, ignore_eos=True))
        await anext(stream)
        assert not await engine.drain(0)
        await engine.stop()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass

    asyncio.run(main())


def test_a_failing_step_fails_every_stream_and_the_engine(build):
    async def main() -> None:
        def broken() -> BuiltEngine:
            built: BuiltEngine = build()

            def step() -> list[tuple[str, TokenEvent]]:
                raise RuntimeError("out of luck")

            built.engine.step = step  # type: ignore[method-assign]
            return built

        engine = NativeEngine(broken, max_queued_requests=100)
        await engine.start()
        with pytest.raises(EngineError, match="out of luck"):
            await collect(engine, request([5, 6, 7]))
        assert engine.state == "failed"
        with pytest.raises(EngineError):
            engine.submit(request([5, 6, 7]))
        await engine.stop()

    asyncio.run(main())


def test_load_errors_reach_start():
    def build() -> BuiltEngine:
        raise ModelNotFoundError("no such model")

    async def main() -> None:
        engine = NativeEngine(build, max_queued_requests=1)
        with pytest.raises(ModelNotFoundError):
            await engine.start()
        assert engine.state == "failed"

    asyncio.run(main())
