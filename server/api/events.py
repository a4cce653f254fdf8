"""Token events of one API request: several engine streams merged, and closed together.

One engine request per prompt; each yields the events of its own choices. Owns their life: whoever leaves
early, for whatever reason, closes all of them. Knows nothing of wire formats.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from paceline.server.api.disconnect import cancel_all
from paceline.server.engine.interface import AsyncEngine, EventStream
from paceline.server.engine.request import Request, TokenEvent, TokenLogprob

#: (index of the prompt, event)
PromptEvent = tuple[int, TokenEvent]


class MergedEvents:
    """Async iterator over the events of several engine requests, in the order in which they happen.

    Construct it inside a running event loop; ``aclose`` must be called in the end, by whatever way it comes.
    """

    def __init__(self, sources: Sequence[EventStream]) -> None:
        self._sources = sources
        self._arrived: asyncio.Queue[PromptEvent | Exception | None] = asyncio.Queue()
        self._running = len(sources)
        self._pumps = [asyncio.create_task(self._pump(i, source)) for i, source in enumerate(sources)]

    def __aiter__(self) -> "MergedEvents":
        return self

    async def __anext__(self) -> PromptEvent:
        while self._running:
            item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._running -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what still runs and close every engine stream; harmless when all have ended."""
        await cancel_all(self._pumps)
        await close_all(self._sources)

    async def _pump(self, prompt: int, source: EventStream) -> None:
        try:
            async for event in source:
                self._arrived.put_nowait((prompt, event))
        except Exception as error:
            self._arrived.put_nowait(error)
        else:
            self._arrived.put_nowait(None)


async def submit_all(engine: AsyncEngine, requests: Sequence[Request]) -> MergedEvents:
    """Queue all requests or none.

    Raises:
        PacelineError: what the engine refused the first refused request with; the ones before it are closed.
    """
    sources: list[EventStream] = []
    try:
        for request in requests:
            sources.append(engine.submit(request))
    except BaseException:
        await close_all(sources)
        raise
    return MergedEvents(sources)


async def close_all(sources: Sequence[EventStream]) -> None:
    """Close engine streams, the rest also when one of them fails."""
    await asyncio.gather(*(source.aclose() for source in sources), return_exceptions=True)


async def with_prompt_logprobs(events: AsyncIterator[PromptEvent]) -> AsyncIterator[PromptEvent]:
    """Give every choice's first event its prompt's log-probabilities; the engine sends them with choice 0.

    Events of other choices that come before them are held back until they are there.
    """
    known: dict[int, tuple[TokenLogprob, ...]] = {}
    held: dict[int, list[TokenEvent]] = {}
    begun: set[tuple[int, int]] = set()

    def completed(prompt: int, event: TokenEvent) -> TokenEvent:
        first = (prompt, event.choice) not in begun
        begun.add((prompt, event.choice))
        return replace(event, prompt_logprobs=known[prompt]) if first else event

    async for prompt, event in events:
        if event.prompt_logprobs is not None:
            known[prompt] = event.prompt_logprobs
        if prompt not in known:
            held.setdefault(prompt, []).append(event)
            continue
        for ready in (*held.pop(prompt, ()), event):
            yield prompt, completed(prompt, ready)


def concatenate(events: Sequence[TokenEvent]) -> TokenEvent:
    """All events of one choice as a single final event."""
    first, last = events[0], events[-1]
    logprobs = None
    if any(event.logprobs is not None for event in events):
        logprobs = tuple(entry for event in events for entry in event.logprobs or ())
    return replace(
        last,
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=max(event.cached_tokens for event in events),
    )
