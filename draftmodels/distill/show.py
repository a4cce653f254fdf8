"""How a training job shows itself: a bar on a terminal, one log line per interval elsewhere. Goes to stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from paceline.draftmodels.distill.checkpoint import JobState
from paceline.draftmodels.distill.parts import Progress

logger = logging.getLogger(__name__)


class Silent:
    """Shows nothing: for ranks other than the main one."""

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``parts.Progress``."""

    def note(self, text: str) -> None:
        """See ``parts.Progress``."""


class LogLines:
    """One log line per interval, and one per note of a measurement or round."""

    def __init__(self, interval_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_seconds, self._clock = interval_seconds, clock
        self._last = float("-inf")

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``parts.Progress``."""
        now = self._clock()
        if now - self._last >= self._interval_seconds:
            self._last = now
            logger.info(progress_line(state, figures, seconds_left))

    def note(self, text: str) -> None:
        """See ``parts.Progress``."""
        logger.info(text)


class Bar:
    """A bar over the budget's share, with the same figures behind it."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task = bar, bar.add_task("starting", total=1.0)

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """See ``parts.Progress``."""
        whole = state.seconds + seconds_left
        done = state.seconds / whole if whole else 0.0
        self._bar.update(self._task, completed=done, description=progress_line(state, figures, seconds_left))

    def note(self, text: str) -> None:
        """See ``parts.Progress``."""
        self._bar.update(self._task, description=text)


@contextmanager
def shown(*, main: bool) -> Iterator[Progress]:
    """Progress of this process: a bar when stderr is a terminal, log lines otherwise."""
    if not main:
        yield Silent()
    elif not sys.stderr.isatty():
        yield LogLines()
    else:
        from rich import progress as bars
        from rich.console import Console

        columns = (bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("{task.description}"))
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            yield Bar(bar)


def progress_line(state: JobState, figures: Mapping[str, Any], seconds_left: float) -> str:
    """``step 120, 0.10M tokens, 812 tokens/s, loss 2.31, alpha 0.35 0.28, 4m left``."""
    rate = state.tokens / state.seconds if state.seconds else 0.0
    alphas = " ".join(f"{alpha:.3f}" for alpha in state.running_alpha)
    left = f"{seconds_left / 60:.0f}m" if seconds_left >= 90 else f"{seconds_left:.0f}s"
    return (
        f"step {state.step}, {state.tokens / 1e6:.2f}M tokens, {rate:.0f} tokens/s, "
        f"loss {figures['loss']:.3f}, alpha {alphas}, {left} left"
    )
