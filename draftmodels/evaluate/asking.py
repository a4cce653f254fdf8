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

    async def run_by_turns(
        self, turns: Sequence[Sequence[tuple[Request, str]]], label: str, *, backwards: bool
    ) -> tuple[Pass, ...]:
        """One pass each of several variants, one stream: a prompt is asked of all of them before the next one is.

        What a machine's speed does from one minute to the next is then the same for all variants.

        Args:
            turns: each variant's requests, for the same prompts in the same order.
            backwards: ask the last variant first at the first prompt; the order is reversed from prompt to prompt.

        Returns:
            The passes in the order of ``turns``; their seconds are the sums of their answers'.
        """
        self._shown.start(label)
        answers: tuple[list[Answer], ...] = tuple([] for _ in turns)
        for index, asked in enumerate(zip(*turns, strict=True)):
            order = list(zip(answers, asked, strict=True))
            for own, (request, category) in reversed(order) if backwards != (index % 2 == 1) else order:
                own.append(await self._ask(index, request, category))
                self._shown.add(len(own[-1].tokens))
        return tuple(Pass(tuple(own), sum(answer.seconds for answer in own)) for own in answers)

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
