"""How a measurement shows itself: a bar on a terminal, one log line per interval elsewhere; both on stderr."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

logger = logging.getLogger(__name__)
_INTERVAL_SECONDS = 10.0


class Progress(Protocol):
    """Somewhere to show answered prompts."""

    def start(self, label: str) -> None:
        """A pass begins."""
        ...

    def add(self, tokens: int) -> None:
        """One more prompt is answered, with so many tokens."""
        ...


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Show ``total`` answers while the context is open."""
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars, total)


class _Bar:
    def __init__(self, bars: Bars, total: int) -> None:
        self._bars, self._rate = bars, _Rate()
        self._task = bars.add_task("", total=total, rate="")

    def start(self, label: str) -> None:
        self._rate.restart()
        self._bars.update(self._task, description=label)

    def add(self, tokens: int) -> None:
        self._bars.update(self._task, advance=1, rate=self._rate.add(tokens))


class _Rate:
    """Tokens per second of the present pass."""

    def restart(self) -> None:
        self._tokens, self._started = 0, time.monotonic()

    def add(self, tokens: int) -> str:
        self._tokens += tokens
        return f"{self._tokens / max(time.monotonic() - self._started, 1e-9):.1f} tok/s"


class _Lines:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._label = total, 0, ""
        self._started = self._last = time.monotonic()
        self._rate = _Rate()

    def start(self, label: str) -> None:
        self._label = label
        self._rate.restart()

    def add(self, tokens: int) -> None:
        self._done += 1
        rate, now = self._rate.add(tokens), time.monotonic()
        if now - self._last >= _INTERVAL_SECONDS:
            self._last = now
            left = (now - self._started) / self._done * (self._total - self._done)
            logger.info(
                "%s: %d/%d answers, %s, %.0f s left", self._label, self._done, self._total, rate, left
            )
