"""How long work on files shows itself: a bar on a terminal, one log line per interval elsewhere.

Owns nothing of what is being done; units are bytes. Bars go to stderr, so that ``--json`` output stays clean.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)

#: Called with the bytes done so far (not the increment).
Update = Callable[[int], None]


class Progress(Protocol):
    """Somewhere to show progress."""

    def task(self, label: str, total_bytes: int) -> AbstractContextManager[Update]:
        """Show one piece of work while the context is open; call the yielded function with bytes done."""
        ...


class BarProgress:
    """A bar with rate and remaining time on the terminal."""

    @contextmanager
    def task(self, label: str, total_bytes: int) -> Iterator[Update]:
        """See ``Progress.task``."""
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total_bytes)
            yield lambda done: bar.update(task, completed=done)


class LogProgress:
    """One log line per interval, for output that is not a terminal."""

    def __init__(self, interval_seconds: float = 10.0) -> None:
        self._interval_seconds = interval_seconds

    @contextmanager
    def task(self, label: str, total_bytes: int) -> Iterator[Update]:
        """See ``Progress.task``."""
        started = last = time.monotonic()
        first_bytes: int | None = (
            None  # what an earlier, interrupted run had left does not count for the rate
        )

        def update(done: int) -> None:
            nonlocal last, first_bytes
            first_bytes = done if first_bytes is None else first_bytes
            now = time.monotonic()
            if now - last >= self._interval_seconds:
                last = now
                rate = (done - first_bytes) / (now - started)
                logger.info(progress_line(label, done, total_bytes, rate))

        logger.info("%s: %.0f MB", label, total_bytes / 1e6)
        yield update
        logger.info("%s: done in %.0f s", label, time.monotonic() - started)


def progress_line(label: str, done: int, total: int, bytes_per_second: float) -> str:
    """``label: 12/98 MB (12%), 3.1 MB/s, 28 s left``."""
    left = f"{max(total - done, 0) / bytes_per_second:.0f} s left" if bytes_per_second > 0 else "stalled"
    share = done / total if total else 1.0
    rate = f"{bytes_per_second / 1e6:.1f} MB/s"
    return f"{label}: {done / 1e6:.0f}/{total / 1e6:.0f} MB ({share:.0%}), {rate}, {left}"


def default_progress() -> Progress:
    """A bar when stderr is a terminal, log lines otherwise."""
    return BarProgress() if sys.stderr.isatty() else LogProgress()
