"""How a training job shows itself: a bar on a terminal, one log line per interval elsewhere. Goes to stderr.

What is shown of a step beside the pace (losses and the like) is said by the kind of job, as ``Describe``.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from paceline.draftmodels.jobs.checkpoint import JobState

logger = logging.getLogger(__name__)

#: (state, figures of the latest step) -> words such as ``loss 2.31``.
Describe = Callable[[Any, Mapping[str, Any]], str]


class Progress(Protocol):
    """Is told how far the job is."""

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """After each step."""
        ...

    def note(self, text: str) -> None:
        """What happens between steps."""
        ...


class Silent:
    """Shows nothing: for ranks other than the main one."""

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``Progress``."""

    def note(self, text: str) -> None:
        """See ``Progress``."""


class LogLines:
    """One log line per interval, and one per note of a measurement or round."""

    def __init__(
        self,
        describe: Describe,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._describe, self._interval_seconds, self._clock = describe, interval_seconds, clock
        self._last = float("-inf")

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``Progress``."""
        now = self._clock()
        if now - self._last >= self._interval_seconds:
            self._last = now
            logger.info(progress_line(state, self._describe(state, figures), seconds_left))

    def note(self, text: str) -> None:
        """See ``Progress``."""
        logger.info(text)


class Bar:
    """A bar over the budget's share, with the same figures behind it."""

    def __init__(self, describe: Describe, bar: Any) -> None:
        self._describe, self._bar, self._task = describe, bar, bar.add_task("starting", total=1.0)

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``Progress``."""
        whole = state.seconds + seconds_left
        done = state.seconds / whole if whole else 0.0
        line = progress_line(state, self._describe(state, figures), seconds_left)
        self._bar.update(self._task, completed=done, description=line)

    def note(self, text: str) -> None:
        """See ``Progress``."""
        self._bar.update(self._task, description=text)


@contextmanager
def shown(describe: Describe, *, main: bool) -> Iterator[Progress]:
    """Progress of this process: a bar when stderr is a terminal, log lines otherwise."""
    if not main:
        yield Silent()
    elif not sys.stderr.isatty():
        yield LogLines(describe)
    else:
        from rich import progress as bars
        from rich.console import Console

        columns = (bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("{task.description}"))
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            yield Bar(describe, bar)


def progress_line(state: JobState, words: str, seconds_left: float) -> str:
    """``step 120, 0.10M tokens, 812 tokens/s, WORDS, 4m left``."""
    rate = state.tokens / state.seconds if state.seconds else 0.0
    left = f"{seconds_left / 60:.0f}m" if seconds_left >= 90 else f"{seconds_left:.0f}s"
    return f"step {state.step}, {state.tokens / 1e6:.2f}M tokens, {rate:.0f} tokens/s, {words}, {left} left"
