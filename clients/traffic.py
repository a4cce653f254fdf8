"""When requests are sent: closed-loop workers or open-loop Poisson arrivals, and what is shown meanwhile.

Owns pacing and progress display. It must not know the wire (``send`` is given) nor how results are summed up.
Closed loop: n workers, each sends its next request when the last is answered; measures a server's capacity.
Open loop: requests come at random moments whether or not the server keeps up; measures what users would feel.
"""

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline.clients.stats import Sample
from paceline.clients.workload import Prompt

Send = Callable[[Prompt], Awaitable[Sample]]
OnSample = Callable[[Sample], None]

LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Exactly ``concurrency`` requests in flight while there are enough left."""

    concurrency: int

    @property
    def name(self) -> str:
        """How the level is called in tables."""
        return str(self.concurrency)

    @property
    def min_requests(self) -> int:
        """Two per worker, so that the level is not all ramp-up."""
        return 2 * self.concurrency

    async def run(self, send: Send, prompts: Iterable[Prompt], on_sample: OnSample) -> list[Sample]:
        """Send all prompts; samples in the order of completion."""
        queue = iter(prompts)
        samples: list[Sample] = []

        async def worker() -> None:
            for prompt in queue:
                samples.append(sample := await send(prompt))
                on_sample(sample)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(worker())
        return samples


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals of ``rate`` requests per second; ``seed`` fixes the moments."""

    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """How the level is called in tables."""
        return f"{self.rate:g}/s"

    @property
    def min_requests(self) -> int:
        """No lower bound of its own."""
        return 1

    async def run(self, send: Send, prompts: Iterable[Prompt], on_sample: OnSample) -> list[Sample]:
        """Send all prompts; samples in the order of completion."""
        moments = random.Random(self.seed)
        samples: list[Sample] = []

        async def one(prompt: Prompt) -> None:
            samples.append(sample := await send(prompt))
            on_sample(sample)

        async with asyncio.TaskGroup() as group:
            due_s = time.perf_counter()  # Absolute times: a late wake-up does not push later arrivals back.
            for prompt in prompts:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(one(prompt))
                due_s += moments.expovariate(self.rate)
        return samples


Level = ClosedLoop | OpenLoop


class Running:
    """Totals so far, as one phrase for a progress line."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self.done = 0
        self.errors = 0
        self.tokens = 0

    def add(self, sample: Sample) -> None:
        """Count one finished request."""
        self.done += 1
        self.errors += sample.error is not None
        self.tokens += sample.output_tokens

    def phrase(self) -> str:
        """Rate over all finished requests, and errors if there were any."""
        rate = self.tokens / (time.perf_counter() - self._started_s)
        return f"{rate:.1f} tok/s" + (f", {self.errors} errors" if self.errors else "")


@contextmanager
def progress(label: str, total: int) -> Iterator[OnSample]:
    """A bar on a terminal, one log line per interval elsewhere; both on stderr."""
    console = Console(stderr=True)
    with _bar(console, label, total) if console.is_terminal else _log_lines(label, total) as on_sample:
        yield on_sample


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[OnSample]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metric]}"),
    )
    running = Running()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, metric="")

        def on_sample(sample: Sample) -> None:
            running.add(sample)
            bar.update(task, advance=1, metric=running.phrase())

        yield on_sample


@contextmanager
def _log_lines(label: str, total: int) -> Iterator[OnSample]:
    running = Running()
    started_s = last_s = time.perf_counter()

    def on_sample(sample: Sample) -> None:
        nonlocal last_s
        running.add(sample)
        now_s = time.perf_counter()
        if now_s - last_s >= LOG_INTERVAL_S:
            last_s = now_s
            eta_s = (now_s - started_s) / running.done * (total - running.done)
            sys.stderr.write(f"{label}: {running.done}/{total}, {running.phrase()}, ETA {eta_s:.0f} s\n")

    yield on_sample
