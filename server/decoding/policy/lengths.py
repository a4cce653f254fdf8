"""The draft lengths of one step that promise the most tokens per second, for all its sequences together.

One more draft token of a sequence adds the chance that it is accepted to the step's tokens, one row to the target's
forward and, from a draft model, one row to one of the draft's forwards; those run once for all sequences. As gains
fall along a block, the best choice of n tokens is the n likeliest, so for each number of draft forwards it is enough
to try every prefix of the tokens in falling order. (Where draft model and n-grams mix, that order leaves out a row of
the draft more or less.)
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paceline.server.decoding.policy.choices import Option
from paceline.server.decoding.policy.costs import StepCosts, mean_context

#: A step with drafts must promise this much more than one without: what is predicted leaves out the work around the
#: forwards, and among many small errors the search finds the flattering ones.
LEAST_WIN = 1.05
#: So many more draft forwards in a row that do not help end the search.
_PATIENCE = 4
#: What an unmeasured step is taken to last.
INSTANT_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Pick:
    """How one sequence would be drafted for.

    Attributes:
        gains: chance that draft token 1, 2, ... is accepted, falling; empty for a sequence that cannot draft.
        first_rows: rows of its first draft forward, the tokens since the last one.
    """

    option: Option | None = None
    gains: Sequence[float] = ()
    first_rows: int = 1

    @property
    def by_model(self) -> bool:
        """Whether drafting takes forwards of a draft model."""
        return self.option is not None and self.option.by_model


class BestAlone(NamedTuple):
    """A block's tokens per second of the batch, expected accepted tokens, seconds of the step, and draft tokens."""

    rate: float
    expected: float
    seconds: float
    length: int


class BatchCosts:
    """Predicted times of a step that decodes the given sequences.

    Args:
        contexts: tokens in the KV cache, per sequence.
    """

    def __init__(self, costs: StepCosts, contexts: Sequence[int]) -> None:
        self.sequences, self._context = len(contexts), mean_context(contexts)
        self._costs = costs
        self._target_seconds: dict[tuple[int, bool], float] = {}
        self._draft_seconds: dict[tuple[float, float], float] = {}
        self._alone_seconds: dict[tuple[bool, int, int], list[float]] = {}

    def seconds(self, draft_tokens: int = 0, draft_forwards: int = 0, draft_rows: int = 0) -> float:
        """Of a step that verifies so many draft tokens, and drafts with so many forwards and rows."""
        drafting = self._draft(draft_forwards, draft_rows) if draft_forwards else 0.0
        verifying = self._target(self.sequences + draft_tokens, draft_forwards > 0)
        return max(verifying + drafting, INSTANT_SECONDS)

    def best_alone(self, pick: Pick, sharing: int) -> BestAlone:
        """The best block of at least one token if only this pick drafts.

        Args:
            sharing: sequences between which the price of draft forwards is divided.
        """
        best, expected = BestAlone(0.0, 0.0, 1.0, 0), 0.0
        known = self._alone_seconds.setdefault((pick.by_model, pick.first_rows, sharing), [])
        for length, gain in enumerate(pick.gains, 1):
            expected += gain
            if length > len(known):
                known.append(self._alone(pick, sharing, length))
            rate = (self.sequences + expected) / known[length - 1]
            if rate > best.rate:
                best = BestAlone(rate, expected, known[length - 1], length)
        return best

    def _alone(self, pick: Pick, sharing: int, length: int) -> float:
        """Seconds of a step in which only this pick drafts, so many tokens."""
        seconds = self._target(self.sequences + length, pick.by_model)
        if pick.by_model:
            seconds += self._draft(length, sharing * (length - 1 + pick.first_rows)) / sharing
        return max(seconds, INSTANT_SECONDS)

    # Kept by hand: a functools.cache per step costs more than what it saves.
    def _target(self, rows: int, drafting: bool) -> float:
        seconds = self._target_seconds.get((rows, drafting))
        if seconds is None:
            seconds = self._target_seconds[rows, drafting] = self._costs.target_seconds(
                rows, self._context, drafting=drafting
            )
        return seconds

    def _draft(self, forwards: float, rows: float) -> float:
        seconds = self._draft_seconds.get((forwards, rows))
        if seconds is None:
            seconds = self._draft_seconds[forwards, rows] = self._costs.draft_seconds(
                forwards, rows, self._context
            )
        return seconds


class _Token(NamedTuple):
    """A draft token that a step might have; ``draft_rows`` of a draft model make it, 0 for n-grams."""

    gain: float
    position: int
    pick: int
    draft_rows: int


def best_lengths(picks: Sequence[Pick], costs: BatchCosts) -> list[int]:
    """Draft lengths, in the order of ``picks``, that maximise expected tokens per predicted second."""
    tokens = [token for i, pick in enumerate(picks) for token in _tokens(i, pick)]
    tokens.sort(key=lambda token: (-token.gain, token.position))
    deepest = max((token.position for token in tokens if token.draft_rows), default=0)
    best_rate, chosen, misses = LEAST_WIN * costs.sequences / costs.seconds(), list[_Token](), 0
    if _most(tokens, costs) <= best_rate:
        return [0] * len(picks)
    for depth in range(deepest + 1):
        allowed = [t for t in tokens if t.position <= depth or not t.draft_rows]
        rate, count = _best_prefix(allowed, costs)
        misses += 1
        if rate > best_rate:
            best_rate, chosen, misses = rate, allowed[:count], 0
        if misses >= _PATIENCE:
            break
    return _lengths(chosen, len(picks))


def _tokens(index: int, pick: Pick) -> Iterator[_Token]:
    rows = pick.first_rows if pick.by_model else 0
    for position, gain in enumerate(pick.gains, 1):
        yield _Token(gain, position, index, rows)
        rows = min(rows, 1)


def _most(tokens: Sequence[_Token], costs: BatchCosts) -> float:
    """A rate that no choice of tokens exceeds, as long as more forwards and rows never cost less.

    It is that of the likeliest tokens, made by one draft forward, or by none where n-grams are among them.
    """
    forwards = int(all(token.draft_rows for token in tokens))
    expected = itertools.accumulate((token.gain for token in tokens), initial=float(costs.sequences))
    next(expected)
    return max((e / costs.seconds(n, forwards, n * forwards) for n, e in enumerate(expected, 1)), default=0.0)


def _best_prefix(tokens: Iterable[_Token], costs: BatchCosts) -> tuple[float, int]:
    """Highest rate over the prefixes of ``tokens`` of at least one, and that prefix's length."""
    best, expected, forwards, rows = (0.0, 0), float(costs.sequences), 0, 0
    for count, (gain, position, _, draft_rows) in enumerate(tokens, 1):
        expected += gain
        if draft_rows and position > forwards:
            forwards = position
        rows += draft_rows
        rate = expected / costs.seconds(count, forwards, rows)
        if rate > best[0]:
            best = rate, count
    return best


def _lengths(chosen: Iterable[_Token], count: int) -> list[int]:
    lengths = [0] * count
    for token in chosen:
        lengths[token.pick] += 1
    return lengths
