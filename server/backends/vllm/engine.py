"""``AsyncEngine`` over vLLM's ``AsyncLLM``: one task per choice turns its outputs into token events.

Everything but loading happens on the event loop that ``start`` was called on. Each choice is a request of vLLM's own,
so that one that has reached a stop string can be ended while the others go on. Knows vLLM only by the protocol ``Llm``.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from paceline.server.backends.vllm.choice import Choice
from paceline.server.backends.vllm.params import check_request, sampling_arguments
from paceline.server.backends.vllm.step_watch import StepWatch
from paceline.server.engine.interface import (
    EngineObserver,
    EngineState,
    EventStream,
    FinishedReason,
    Load,
    ModelInfo,
)
from paceline.server.engine.request import Request
from paceline.server.engine.stream import QueueStream
from paceline.server.errors import (
    EngineError,
    InvalidRequestError,
    PacelineError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
)

_log = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = {"loading": 5, "draining": 10, "stopped": 10}
#: How long vLLM's processes may take to end before they are killed.
_SHUTDOWN_SECONDS = 5.0


class Llm(Protocol):
    """What is used of ``vllm.v1.engine.async_llm.AsyncLLM``."""

    @property
    def errored(self) -> bool:
        """Whether an engine core has died."""
        ...

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """Outputs of one request; closing the generator aborts it."""
        ...

    def shutdown(self, timeout: float | None = None) -> None:
        """End the processes; blocks."""
        ...


@dataclass(frozen=True)
class Connected:
    """vLLM, loaded.

    Attributes:
        make_params: vLLM's ``SamplingParams`` for what ``params.sampling_arguments`` gives.
        is_client_error: whether an exception of ``generate`` says that the request is at fault.
        max_running: choices that vLLM runs at the same time; more are waiting.
        watch: what it told of its last steps.
        greedy_only, unseeded: see ``params.check_request``.
    """

    llm: Llm
    model: ModelInfo
    make_params: Callable[[Mapping[str, Any]], Any]
    is_client_error: Callable[[Exception], bool]
    max_running: int
    watch: StepWatch
    greedy_only: bool = False
    unseeded: bool = False


class VllmEngine:
    """See the module's docstring.

    Args:
        connect: loads vLLM; runs in a thread of its own.
        observer: told of every finished choice; the steps are for ``connect`` to report.
        max_queued_requests: choices that may wait before new requests are refused with 429.
        kill: ends vLLM's processes when nobody waits for loading any more.
    """

    def __init__(
        self,
        connect: Callable[[], Connected],
        observer: EngineObserver,
        *,
        max_queued_requests: int,
        kill: Callable[[], None],
    ) -> None:
        self._connect, self._observer, self._kill = connect, observer, kill
        self._max_queued = max_queued_requests
        self._state: EngineState = "loading"
        self._connected: Connected | None = None
        self._streams: dict[str, QueueStream] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._open_choices = 0

    @property
    def state(self) -> EngineState:
        """Current life-cycle state; "failed" as soon as an engine core has died."""
        if (
            self._state in ("ready", "draining")
            and self._connected is not None
            and self._connected.llm.errored
        ):
            self._state = "failed"
        return self._state

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The served model by name; empty until loaded."""
        return {} if self._connected is None else {self._connected.model.name: self._connected.model}

    def loads(self) -> Mapping[str, Load]:
        """Running and waiting choices."""
        if self._connected is None:
            return {}
        waiting = self._waiting()
        return {self._connected.model.name: Load(self._open_choices - waiting, waiting)}

    def kv_usage(self) -> float:
        """Share of KV blocks in use, as of vLLM's last step."""
        return self._connected.watch.kv_usage if self._connected is not None and self._open_choices else 0.0

    async def start(self) -> None:
        """See ``AsyncEngine.start``."""
        try:
            self._connected = await asyncio.to_thread(self._connect)
        except asyncio.CancelledError:
            self._kill()
            raise
        except BaseException:
            self._state = "failed"
            raise
        self._state = "ready"

    def submit(self, request: Request) -> EventStream:
        """See ``AsyncEngine.submit``."""
        connected = self._require_ready()
        self._check(request, connected)
        stream = QueueStream(lambda: self.cancel(request.id), request.n)
        self._streams[request.id] = stream
        self._open_choices += request.n
        choices = [Choice(request, index, connected.model.tokenizer) for index in range(request.n)]
        self._tasks[request.id] = [
            asyncio.create_task(self._run(connected, request, index, choice, stream))
            for index, choice in enumerate(choices)
        ]
        return stream

    def cancel(self, request_id: str) -> None:
        """Forget a request; what still runs of it is aborted."""
        self._streams.pop(request_id, None)
        for task in self._tasks.pop(request_id, ()):
            task.cancel()

    async def drain(self, timeout_seconds: float) -> bool:
        """See ``AsyncEngine.drain``."""
        if self.state == "ready":
            self._state = "draining"
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while self._streams and self.state == "draining":
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return not self._streams

    async def stop(self) -> None:
        """See ``AsyncEngine.stop``."""
        error: PacelineError
        if self.state == "failed":  # maybe before vLLM has told every stream
            error = EngineError("the engine has failed; see the log")
        else:
            self._state = "stopped"
            error = UnavailableError("the server has stopped", code="stopped", retry_after_seconds=10)
        streams, tasks = list(self._streams.values()), [t for own in self._tasks.values() for t in own]
        for request_id in list(self._streams):
            self.cancel(request_id)
        for stream in streams:
            stream.put(error)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connected is not None:
            await asyncio.to_thread(partial(self._connected.llm.shutdown, timeout=_SHUTDOWN_SECONDS))

    def _require_ready(self) -> Connected:
        state = self.state
        if state == "failed":
            raise EngineError("the engine has failed; see the log")
        if state != "ready":
            raise UnavailableError(
                f"the server is {state}", code=state, retry_after_seconds=_RETRY_AFTER_SECONDS[state]
            )
        assert self._connected is not None
        return self._connected

    def _check(self, request: Request, connected: Connected) -> None:
        if request.model != connected.model.name:
            raise UnknownModelError(f"the model {request.model!r} is not served here", param="model")
        check_request(
            request, connected.model, greedy_only=connected.greedy_only, unseeded=connected.unseeded
        )
        if request.id in self._streams:
            raise InvalidRequestError(f"request id {request.id!r} is already in use")
        waiting = self._waiting()
        if waiting >= self._max_queued:
            raise QueueFullError(
                f"{waiting} requests are waiting already; try again later", retry_after_seconds=1
            )

    def _waiting(self) -> int:
        """Choices that vLLM says are waiting, or that are too many to run, be it that it has not seen them yet."""
        assert self._connected is not None
        beyond = self._open_choices - self._connected.max_running
        return min(self._open_choices, max(self._connected.watch.waiting, beyond))

    async def _run(
        self, connected: Connected, request: Request, index: int, choice: Choice, stream: QueueStream
    ) -> None:
        """One choice, from its start to whatever ends it."""
        ended: FinishedReason = "error"
        try:
            await self._feed(connected, request, index, choice, stream)
            ended = "stop"
        except asyncio.CancelledError:
            ended = "abort"
            raise
        except Exception as error:
            self._fail(request.id, stream, _as_ours(error, connected.is_client_error))
        finally:
            self._open_choices -= 1
            done = choice.finished
            self._observer.on_request(choice.final_stats() if done else choice.stats(ended))

    async def _feed(
        self, connected: Connected, request: Request, index: int, choice: Choice, stream: QueueStream
    ) -> None:
        arguments = sampling_arguments(request, index, choice.stop_ids)
        outputs = connected.llm.generate(
            {"prompt_token_ids": list(request.prompt_ids)},
            connected.make_params(arguments),
            f"{request.id}-{index}",
        )
        async with aclosing(outputs):
            async for output in outputs:
                event = choice.take(output)
                if event is not None:
                    stream.put(event)
                if choice.finished:
                    return
        raise EngineError("vLLM ended a request without finishing it")

    def _fail(self, request_id: str, stream: QueueStream, error: PacelineError) -> None:
        """End a request whose choice has failed; the others are of no use any more."""
        self._streams.pop(request_id, None)
        current = asyncio.current_task()
        for task in self._tasks.pop(request_id, ()):
            if task is not current:
                task.cancel()
        stream.put(error)


def _as_ours(error: Exception, is_client_error: Callable[[Exception], bool]) -> PacelineError:
    if isinstance(error, PacelineError):
        return error
    if is_client_error(error):
        return InvalidRequestError(f"vLLM refuses the request: {' '.join(str(error).split())}")
    _log.error("vLLM failed a request", exc_info=error)
    return EngineError(f"{type(error).__name__}: {error}")
