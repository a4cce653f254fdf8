"""One request's token events on their way to whoever asked: filled by an engine, read by the API.

Knows neither engine: an engine gives it a way to cancel, and puts events or the error that ends everything.
"""

import asyncio
from collections.abc import Callable, Sequence

from paceline.server.engine.request import TokenEvent
from paceline.server.errors import PacelineError


class QueueStream:
    """``EventStream`` over a queue; ends after the last choice's final event.

    Construct it on the event loop that reads it, which is also where ``put`` has to be called.

    Args:
        close: told once nobody listens any more, be it that all choices have ended; may be called repeatedly.
        choices: how many final events there will be.
        whole: whether the reader has no use for events before the last of them.
    """

    def __init__(self, close: Callable[[], None], choices: int, *, whole: bool = False) -> None:
        self.loop = asyncio.get_running_loop()
        self._close, self._open_choices = close, choices
        self._kept: list[TokenEvent] | None = [] if whole else None
        self._unfinished = choices
        self._queue: asyncio.Queue[TokenEvent | PacelineError] = asyncio.Queue()

    def due(self, event: TokenEvent) -> Sequence[TokenEvent]:
        """What is to be put now that there is a further event: that one, or all at the end. For one thread only."""
        if self._kept is None:
            return (event,)
        self._kept.append(event)
        self._unfinished -= event.finish_reason is not None
        return () if self._unfinished else self._kept

    def put(self, item: TokenEvent | PacelineError) -> None:
        """Add an event, or the error that the reader gets in place of further events."""
        self._queue.put_nowait(item)

    def __aiter__(self) -> "QueueStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if not self._open_choices:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, PacelineError):
            self._open_choices = 0
            raise item
        if item.finish_reason is not None:
            self._open_choices -= 1
            if not self._open_choices:
                self._close()
        return item

    async def aclose(self) -> None:
        """Stop listening; cancels the request if it still runs."""
        self._open_choices = 0
        self._close()
