"""What a trainer works with: the seams to text, teacher, measurement and progress, filled by ``sources``, ``job``,
``show``, and by stand-ins in tests."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paceline.draftmodels.distill.checkpoint import JobState
from paceline.draftmodels.distill.layout import Tokens
from paceline.draftmodels.distill.objective import Rows
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks


class TextSource(Protocol):
    """Where a round's sequences come from."""

    def sequences(self, round_: int, draft: Path | None) -> Sequence[Tokens]:
        """The answers of a round, the same ones whenever it is asked again.

        Args:
            draft: artifact of the current draft, if some answers are its own.
        """
        ...


class Teacher(Protocol):
    """The target's distributions and states."""

    def rows(self, sequences: Sequence[Tokens]) -> Sequence[Rows]:
        """One per sequence."""
        ...


class Judge(Protocol):
    """Measures drafts through the serving engine."""

    def measure(self, draft: Path) -> Mapping[str, Any]:
        """At least ``tau`` and ``alpha_per_position`` on held-out prompts, ready for JSON."""
        ...


class Progress(Protocol):
    """Is told how far the job is."""

    def step(self, state: JobState, figures: Mapping[str, Any], seconds_left: float) -> None:
        """After each step."""
        ...

    def note(self, text: str) -> None:
        """What happens between steps."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a trainer works with.

    Attributes:
        export: writes the draft as it is to a folder, with measured figures.
        threads: for torch while it trains.
        started: when the job began, on ``clock``: opening models and writing first prompts count as its time, too.
    """

    text: TextSource
    teacher: Teacher
    judge: Judge
    progress: Progress
    export: Callable[[Path, Sequence[Mapping[str, Any]]], None]
    threads: int
    ranks: Ranks = ONE_RANK
    clock: Callable[[], float] = time.monotonic
    started: float | None = None
