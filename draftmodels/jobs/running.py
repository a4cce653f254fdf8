"""A running job: what it has used of its budget, whether to stop, and Ctrl-C, which waits for the end of a step."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from paceline.draftmodels.jobs.budget import Budget
from paceline.draftmodels.jobs.checkpoint import JobState
from paceline.draftmodels.jobs.ranks import Ranks


class RunningJob:
    """Time, budget and interruption of one job.

    Args:
        state: its seconds are kept up to date.
        started: when the job began, on ``clock``: opening models and the like count as its time, too.

    Attributes:
        interrupted: whether Ctrl-C ends the job: as ``stop`` last found it on the main rank, so that all ranks agree.
    """

    def __init__(
        self,
        state: JobState,
        budget: Budget,
        ranks: Ranks,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self._state, self._budget, self._ranks, self._clock = state, budget, ranks, clock
        self.interrupted = self._signalled = False
        self._saved_at = clock()
        self._worked_from = self._saved_at if started is None else started

    def used(self) -> float:
        """The used share of the budget, the same on all ranks: the main one decides, as clocks differ."""
        self.count_time()
        state = self._state
        return self._ranks.from_main(
            self._budget.used(seconds=state.seconds, tokens=state.tokens, steps=state.step)
        )

    def seconds_left(self) -> float:
        """An estimate from the pace so far."""
        state = self._state
        return self._budget.seconds_left(seconds=state.seconds, tokens=state.tokens, steps=state.step)

    def steps_left(self, step_tokens: int) -> float:
        """Steps to come, see ``Budget.steps_left``; the same on all ranks."""
        state = self._state
        return self._ranks.from_main(
            self._budget.steps_left(
                seconds=state.seconds, tokens=state.tokens, steps=state.step, step_tokens=step_tokens
            )
        )

    def stop(self, *, exhausted: bool) -> bool:
        """Whether to stop: budget used, patience at its end, or Ctrl-C; the main rank decides."""
        over = self.used() >= 1 or exhausted
        over, self.interrupted = self._ranks.from_main((over, self._signalled))
        return over or self.interrupted

    def count_time(self) -> None:
        """Add the time since the last call to the job's."""
        now = self._clock()
        self._state.seconds += now - self._worked_from
        self._worked_from = now

    def seconds_since_save(self) -> float:
        """Since ``saved``, or the start."""
        return self._clock() - self._saved_at

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved_at = self._clock()

    @contextmanager
    def training(self, threads: int) -> Iterator[None]:
        """``threads`` for torch inside; Ctrl-C waits for the end of a step, a second one does not."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._signalled:  # a second time: at once, from the last checkpoint
                if callable(previous):
                    previous(number, frame)
                raise KeyboardInterrupt
            self._signalled = True

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            torch.set_num_threads(before)
