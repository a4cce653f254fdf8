"""What a measurement leaves behind, pass by pass; plain data between the engine and the figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.draftmodels.evaluate.answers import Pass
from paceline.draftmodels.evaluate.steering.variants import Variant
from paceline.server.engine.interface import ModelInfo


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of timed pass."""

    streams: int
    speculates: bool


@dataclass(frozen=True, slots=True)
class Changed:
    """Tokens whose place the base would have given to another one."""

    changed: int
    tokens: int


@dataclass(slots=True)
class Outcome:
    """What has been measured so far, by the variants' labels, so that it survives an interruption.

    Attributes:
        rounds: whole ones only.
    """

    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    variants: Sequence[Variant] = ()
    scored: dict[str, Pass] = field(default_factory=dict)
    changed: dict[str, Changed] = field(default_factory=dict)
    rounds: list[dict[tuple[str, Kind], Pass]] = field(default_factory=list)
