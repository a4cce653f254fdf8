"""What a trainer works with: the seams to text, teacher and measurement, filled by ``sources``, ``job`` and by
stand-ins in tests; and the state that it keeps."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from paceline.draftmodels.distill.layout import Tokens
from paceline.draftmodels.distill.objective import Rows
from paceline.draftmodels.jobs.checkpoint import JobState, Loaded
from paceline.draftmodels.jobs.ranks import ONE_RANK, Ranks
from paceline.draftmodels.jobs.show import Progress

_VOCAB = "vocab_ids"


@dataclass
class DraftState(JobState):
    """How far a draft's job is.

    Attributes:
        labels_outside: with loss ce, labels that were skipped as the draft cannot propose them.
        running_alpha: per unrolled step, running mean of sum_v min(p, q) on training rows.
        best_tau: the best measured so far.
    """

    labels_outside: int = 0
    running_alpha: list[float] = field(default_factory=list)
    best_tau: float | None = None


def with_vocab(tensors: Mapping[str, Tensor], vocab_ids: Tensor | None) -> dict[str, Tensor]:
    """What a checkpoint holds: ``training_tensors`` and the ids that the draft proposes, if not all."""
    return dict(tensors) if vocab_ids is None else {**tensors, _VOCAB: vocab_ids.int()}


def without_vocab(loaded: Loaded[DraftState]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inverse of ``with_vocab``."""
    tensors = dict(loaded.tensors)
    return tensors, tensors.pop(_VOCAB, None)


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
