"""Whole pieces of work on a thread each, as torch's own threads meet after every operation.

On a busy machine those meetings cost more than they bring: a block took 20 s on two torch threads and 9 s on one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from paceline.draftmodels.stepping import torch_threads

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Pool:
    """Threads that each run torch on one thread."""

    def __init__(self, threads: int, executor: ThreadPoolExecutor) -> None:
        self._threads, self._executor = threads, executor

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Results in the order of the items; at most one more item than threads is begun before its turn."""
        running: deque[Future[_Result]] = deque()
        try:
            for item in items:
                running.append(self._executor.submit(function, item))
                if len(running) > self._threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def pool_of(threads: int) -> Iterator[Pool]:
    """A pool; torch keeps to one thread everywhere while it is open."""
    with torch_threads(1), ThreadPoolExecutor(threads) as executor:
        yield Pool(threads, executor)
