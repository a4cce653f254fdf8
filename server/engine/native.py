"""The native engine's asyncio face: a thread that owns all mutable state and steps it, and a bridge to asyncio.

Asyncio sends commands in (submit, cancel) through a locked inbox and receives token events; nothing else is shared.
Loading happens on the engine thread too, so that the API can answer health checks meanwhile.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paceline.server.engine.engine import Engine
from paceline.server.engine.interface import EngineState, EventStream, Load, ModelInfo
from paceline.server.engine.request import Request, TokenEvent
from paceline.server.engine.stream import QueueStream
from paceline.server.errors import (
    EngineError,
    InvalidRequestError,
    PacelineError,
    QueueFullError,
    UnavailableError,
)

_log = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = {"loading": 5, "draining": 10, "stopped": 10}


@dataclass(frozen=True)
class BuiltEngine:
    """What the builder returns: the stepper and what clients may know of its models."""

    engine: Engine
    models: Mapping[str, ModelInfo]


@dataclass(frozen=True)
class _Submit:
    request: Request


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class NativeEngine:
    """``AsyncEngine`` over ``Engine``.

    Args:
        build: loads the models; runs on the engine thread.
        max_queued_requests: choices that may wait before new requests are refused with 429.
    """

    def __init__(self, build: Callable[[], BuiltEngine], *, max_queued_requests: int) -> None:
        self._build = build
        self._max_queued = max_queued_requests
        self._state: EngineState = "loading"
        self._models: Mapping[str, ModelInfo] = {}
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._inbox: deque[_Submit | _Cancel] = deque()
        self._streams: dict[str, QueueStream] = {}
        self._loads: Mapping[str, Load] = {}
        self._kv_usage = 0.0
        self._stopping = False

    @property
    def state(self) -> EngineState:
        """Current life-cycle state."""
        return self._state

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """Served models by name; empty until loaded."""
        return self._models

    def loads(self) -> Mapping[str, Load]:
        """Running and waiting choices per model, as of the last step."""
        return self._loads

    def kv_usage(self) -> float:
        """Share of KV blocks in use, as of the last step."""
        return self._kv_usage

    async def start(self) -> None:
        """See ``AsyncEngine.start``."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, ready), name="engine", daemon=True)
        self._thread.start()
        await ready

    def submit(self, request: Request) -> EventStream:
        """See ``AsyncEngine.submit``."""
        if self._state == "failed":
            raise EngineError("the engine has failed; see the log")
        if self._state != "ready":
            raise UnavailableError(
                f"the server is {self._state}",
                code=self._state,
                retry_after_seconds=_RETRY_AFTER_SECONDS[self._state],
            )
        assert self._engine is not None
        self._engine.check(request)
        stream = QueueStream(lambda: self.cancel(request.id), request.n, whole=not request.streams)
        with self._wake:
            if request.id in self._streams:
                raise InvalidRequestError(f"request id {request.id!r} is already in use")
            waiting = sum(load.waiting for load in self._loads.values())
            waiting += sum(c.request.n for c in self._inbox if isinstance(c, _Submit))
            if waiting >= self._max_queued:
                raise QueueFullError(
                    f"{waiting} requests are waiting already; try again later", retry_after_seconds=1
                )
            self._streams[request.id] = stream
            self._inbox.append(_Submit(request))
            self._wake.notify()
        return stream

    def cancel(self, request_id: str) -> None:
        """Forget a request; its blocks are free before the next step."""
        with self._wake:
            if self._streams.pop(request_id, None) is not None:
                self._inbox.append(_Cancel(request_id))
                self._wake.notify()

    async def drain(self, timeout_seconds: float) -> bool:
        """See ``AsyncEngine.drain``."""
        if self._state == "ready":
            self._state = "draining"
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while self._streams and self._state == "draining":
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return not self._streams

    async def stop(self) -> None:
        """See ``AsyncEngine.stop``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._state != "failed":
            self._state = "stopped"
        self._fail_streams(UnavailableError("the server has stopped", code="stopped", retry_after_seconds=10))

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[None]") -> None:
        """The engine thread."""
        try:
            built = self._build()
        except BaseException as error:
            self._state = "failed"
            _call(loop, _settle, ready, error)
            return
        self._engine, self._models = built.engine, built.models
        self._loads = built.engine.loads()
        self._state = "ready"
        _call(loop, _settle, ready, None)
        try:
            while self._take_commands(built.engine):
                self._deliver(built.engine.step())
        except Exception as error:
            _log.exception("the engine failed")
            self._state = "failed"
            self._fail_streams(EngineError(f"{type(error).__name__}: {error}"))

    def _take_commands(self, engine: Engine) -> bool:
        """Wait for work and carry out the inbox; False when stopping."""
        with self._wake:
            self._publish(engine)
            while not (self._inbox or engine.has_work or self._stopping):
                self._wake.wait()
            while self._inbox:
                command = self._inbox.popleft()
                if isinstance(command, _Submit):
                    engine.submit(command.request)
                else:
                    engine.cancel(command.request_id)
            self._publish(engine)
            return not self._stopping

    def _publish(self, engine: Engine) -> None:
        self._loads, self._kv_usage = engine.loads(), engine.kv_usage()

    def _deliver(self, events: list[tuple[str, TokenEvent]]) -> None:
        """Hand a step's events to their streams, one wake-up per event loop that has something to do."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[QueueStream, TokenEvent]]] = {}
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None and (due := stream.due(event)):
                by_loop.setdefault(stream.loop, []).extend((stream, one) for one in due)
        for loop, pairs in by_loop.items():
            _call(loop, _put_all, pairs)

    def _fail_streams(self, error: PacelineError) -> None:
        with self._wake:
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            _call(stream.loop, stream.put, error)


def _put_all(pairs: list[tuple[QueueStream, TokenEvent]]) -> None:
    for stream, event in pairs:
        stream.put(event)


def _settle(ready: "asyncio.Future[None]", error: BaseException | None) -> None:
    if ready.cancelled():
        return
    if error is None:
        ready.set_result(None)
    else:
        ready.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """``call_soon_threadsafe`` that tolerates a loop that has ended."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        _log.debug("event loop closed before an event could be delivered")
