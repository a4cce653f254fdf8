"""How pruning shows itself: a bar on a terminal, one log line per interval elsewhere. Goes to stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Somewhere to show a line and how much is done."""

    def show(self, line: str, share: float) -> None:
        """``share`` of the work, 0 to 1, is done."""
        ...

    def note(self, text: str) -> None:
        """Something happened that is worth a line of its own."""
        ...


class LogLines:
    """One log line per interval; notes at once."""

    def __init__(self, interval_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_seconds, self._clock = interval_seconds, clock
        self._last = float("-inf")

    def show(self, line: str, share: float) -> None:
        """See ``Display``."""
        now = self._clock()
        if now - self._last >= self._interval_seconds:
            self._last = now
            logger.info(line)

    def note(self, text: str) -> None:
        """See ``Display``."""
        logger.info(text)


class Bar:
    """A bar with the line behind it; notes above it."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task = bar, bar.add_task("starting", total=1.0)

    def show(self, line: str, share: float) -> None:
        """See ``Display``."""
        self._bar.update(self._task, completed=share, description=line)

    def note(self, text: str) -> None:
        """See ``Display``."""
        self._bar.console.print(text)


@contextmanager
def shown() -> Iterator[Display]:
    """A bar when stderr is a terminal, log lines otherwise."""
    if not sys.stderr.isatty():
        yield LogLines()
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("{task.description}"))
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        yield Bar(bar)


class Meter:
    """Counts equal pieces of work and says how it goes.

    Args:
        layers: of the model.
        total: pieces, in all.
    """

    def __init__(
        self, display: Display, layers: int, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.display = display
        self._layers, self._total, self._clock = layers, total, clock
        self._started, self._done = clock(), 0
        self._what, self._layer, self._error = "", 0, float("nan")

    def layer(self, what: str, layer: int) -> None:
        """Work on a layer begins; ``what`` is done to it."""
        self._what, self._layer = what, layer

    def error(self, value: float) -> None:
        """Relative output error of what was pruned last."""
        self._error = value

    def advance(self) -> None:
        """One piece is done."""
        self._done += 1
        self.display.show(self.line(), min(1.0, self._done / self._total))

    def line(self) -> str:
        """``pruning layer 13/30, 0.21 layers/s, error 0.034, 81 s left``."""
        seconds = self._clock() - self._started
        parts = [f"{self._what} layer {self._layer + 1}/{self._layers}"]
        if self._done and seconds > 0:
            parts.append(f"{self._done / self._total * self._layers / seconds:.2f} layers/s")
        if self._error == self._error:
            parts.append(f"error {self._error:.3f}")
        if self._done:
            parts.append(f"{seconds / self._done * (self._total - self._done):.0f} s left")
        return ", ".join(parts)
