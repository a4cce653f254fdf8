"""What a pruning job has made, for whoever tells about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline.draftmodels.prune.walk import LinearFigures
from paceline.server.models.quality import Quality


@dataclass(frozen=True)
class Outcome:
    """What a job has made.

    Attributes:
        sparsity: of all pruned linears together.
        quality: of the stored weights against the dense target, on held-out text.
        seconds: of reading or writing texts, pruning, measuring; and of everything.
    """

    path: Path
    sparsity: float
    linears: tuple[LinearFigures, ...]
    quality: Quality
    measured_on: str
    seconds: Mapping[str, float]
    weights_bytes: int
