"""Requests through the serving engine, so many at a time, and what each of them left behind."""

import asyncio
import itertools
import time
from collections.abc import Sequence

from paceline.draftmodels.evaluate.answers import Answer, Pass
from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.draftmodels.evaluate.progress import Progress
from paceline.server.engine.interface import AsyncEngine, RequestStats, StepStats
from paceline.server.engine.request import Request


class Unobserved:
    """An engine observer that keeps nothing."""

    def on_step(self, stats: StepStats) -> None:
        """See ``EngineObserver.on_step``."""

    def on_request(self, stats: RequestStats) -> None:
        """See ``EngineObserver.on_request``."""


class Asker:
    """Asks an engine; verified blocks are those that ``examiner`` saw."""

    def __init__(self, engine: AsyncEngine, examiner: BlockExaminer, shown: Progress) -> None:
        self._engine, self._examiner, self._shown = engine, examiner, shown

    async def run(self, requests: Sequence[tuple[Request, str]], streams: int, label: str) -> Pass:
        """One pass: ``streams`` workers take the requests, each with its category, in order."""
        self._shown.start(label)
        waiting = iter(enumerate(requests))
        answers: dict[int, Answer] = {}

        async def work() -> None:
            for index, (request, category) in waiting:
                answers[index] = await self._ask(index, request, category)
                self._shown.add(len(answers[index].tokens))

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(streams)))
        seconds = time.perf_counter() - started
        return Pass(tuple(answers[index] for index in range(len(requests))), seconds)

    async def _ask(self, index: int, request: Request, category: str) -> Answer:
        started = time.perf_counter()
        events, times = [], []
        async for event in self._engine.submit(request):
            events.append(event)
            if event.token_ids:
                times.append(time.perf_counter())
        seconds = time.perf_counter() - started
        commits = [event.token_ids for event in events if event.token_ids]
        return Answer(
            index,
            category,
            tuple(itertools.chain.from_iterable(commits)),
            max(0, len(commits) - 1),
            seconds,
            self._examiner.take(request.id),
            "".join(event.text for event in events),
            times[-1] - times[0] if times else 0.0,
        )
