"""What the engine accepted of a draft's proposals, counted over verified blocks. Plain numbers, no tensors.

Terms: position j (from 0) of a block is *examined* if all draft tokens before it were accepted; alpha at j is accepted
over examined there. tau counts every target forward after the one of the prompt, blocks cut short at an answer's end
and forwards without a block included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.server.engine.interface import RequestStats, StepStats

#: The tokens that one request's forwards committed, in order; the first is the prompt's forward.
Commits = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts of one measurement, and what follows from them.

    Attributes:
        examined, accepted_at: per position of a block.
        histogram: how many blocks had exactly i draft tokens accepted, i from 0 to the block length.
        n_tokens: tokens of all answers.
        drafted, accepted: draft tokens of all blocks.
        forwards, committed: target forwards after the prompts' own, and the tokens that they committed.
    """

    examined: tuple[int, ...]
    accepted_at: tuple[int, ...]
    histogram: tuple[int, ...]
    n_tokens: int
    drafted: int
    accepted: int
    forwards: int
    committed: int

    @property
    def alpha_per_position(self) -> tuple[float, ...]:
        """Acceptance rate at each position; NaN where none was examined."""
        return tuple(_ratio(a, e) for a, e in zip(self.accepted_at, self.examined, strict=True))

    @property
    def alpha(self) -> float:
        """Acceptance rate over all examined positions."""
        return _ratio(sum(self.accepted_at), sum(self.examined))

    @property
    def tau(self) -> float:
        """Block efficiency: committed tokens per target forward."""
        return _ratio(self.committed, self.forwards)


class BlockCounter:
    """An ``EngineObserver`` that remembers how every verified block went.

    Args:
        draft_tokens: longest block.
    """

    def __init__(self, draft_tokens: int = 0) -> None:
        self._draft_tokens = draft_tokens
        self._blocks: list[tuple[int, int]] = []

    def on_step(self, stats: StepStats) -> None:
        """See ``EngineObserver``."""
        self._blocks.extend(zip(stats.drafted_per_block, stats.accepted_per_block, strict=True))

    def on_request(self, stats: RequestStats) -> None:
        """See ``EngineObserver``; requests are of no interest."""

    def acceptance(self, commits: Sequence[Commits]) -> Acceptance:
        """The figures, given what each request's forwards committed."""
        examined, accepted_at = [0] * self._draft_tokens, [0] * self._draft_tokens
        histogram = [0] * (self._draft_tokens + 1)
        for drafted, accepted in self._blocks:
            histogram[accepted] += 1
            for position in range(min(accepted + 1, drafted)):
                examined[position] += 1
                accepted_at[position] += position < accepted
        later = [tokens for own in commits for tokens in own[1:] if tokens]
        return Acceptance(
            tuple(examined),
            tuple(accepted_at),
            tuple(histogram),
            n_tokens=sum(len(tokens) for own in commits for tokens in own),
            drafted=sum(drafted for drafted, _ in self._blocks),
            accepted=sum(accepted for _, accepted in self._blocks),
            forwards=len(later),
            committed=sum(map(len, later)),
        )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
