"""Seconds that the parts of a step take: measured online, predicted for widths not tried lately.

Each fit is a non-negative linear function of three features, least squares with exponential forgetting, times a
decayed mean of measured / predicted per bucket: the line extrapolates, the buckets know the steps of the kernels (a
tile more, another path for one row). A ridge towards a typical shape decides only what the data leave open, such as
the price of a second row while only single rows ran.
"""

from collections.abc import Sequence
from math import log2

from paceline.server.decoding.policy.choices import StepWork

#: Forgetting per observation: about the last 50 count.
_KEEP = 0.98
_BUCKET_KEEP = 0.9
#: Pseudo-observations at 1 in every bucket's mean ratio.
_BUCKET_PRIOR = 2.0
#: After this many observations a fit is used to clip outliers, and is solved only every ``_SOLVE_EVERY``-th time.
_TRUSTED = 16
_SOLVE_EVERY = 8
_SWEEPS = 8
#: The first call of anything warms caches and threads; a stalled step says nothing about the next one.
_FIRST_WEIGHT = 0.05
_OUTLIER = 2.5
_RIDGE = 0.2
#: Rows up to here have a bucket each, more share four per doubling.
_EXACT_ROWS = 16
#: With fewer catch-up rows in a step their price drowns in the rest.
_LEAST_CATCH_UP_ROWS = 16
#: Price of one row of a long batch in draft forwards, until it was measured.
_CATCH_UP_SHARE = 0.1

_Features = tuple[float, float, float]
#: Unit of each feature (calls, rows, row x context tokens), of the size in which it varies.
_SCALES: _Features = (1.0, 4.0, 2000.0)
#: Typical seconds per call, row and row x context token, relative to each other.
_SHAPE: _Features = (1.0, 0.02, 1e-5)


class CostFit:
    """See the module docstring; features are (calls, rows, row x context tokens)."""

    def __init__(self) -> None:
        self.count = 0
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._seconds = self._shapes = 0.0
        self._slopes = [0.0] * 3
        self._ratios: dict[int, tuple[float, float]] = {}

    def predict(self, features: _Features, bucket: int) -> float:
        """Seconds; 0 before the first observation."""
        total, weight = self._ratios.get(bucket, (0.0, 0.0))
        return self._line(features) * (total + _BUCKET_PRIOR) / (weight + _BUCKET_PRIOR)

    def observe(self, features: _Features, bucket: int, seconds: float) -> None:
        """Learn from one measurement."""
        if self.count >= _TRUSTED:
            seconds = min(seconds, _OUTLIER * self.predict(features, bucket))
        self._accumulate(features, seconds, 1.0 if self.count else _FIRST_WEIGHT)
        self.count += 1
        if self.count <= 2 * _TRUSTED or self.count % _SOLVE_EVERY == 0:
            self._solve()
        if self.count > _TRUSTED and (line := self._line(features)) > 0:
            total, weight = self._ratios.get(bucket, (0.0, 0.0))
            self._ratios[bucket] = (total * _BUCKET_KEEP + seconds / line, weight * _BUCKET_KEEP + 1)

    def _line(self, features: _Features) -> float:
        return sum(x / unit * slope for x, unit, slope in zip(features, _SCALES, self._slopes, strict=True))

    def _accumulate(self, features: _Features, seconds: float, weight: float) -> None:
        scaled = [x / unit for x, unit in zip(features, _SCALES, strict=True)]
        for i in range(3):
            for j in range(3):
                self._products[i][j] = _KEEP * self._products[i][j] + weight * scaled[i] * scaled[j]
            self._targets[i] = _KEEP * self._targets[i] + weight * scaled[i] * seconds
        shape = sum(x * share for x, share in zip(features, _SHAPE, strict=True))
        self._seconds = _KEEP * self._seconds + weight * seconds
        self._shapes = _KEEP * self._shapes + weight * shape

    def _solve(self) -> None:
        """Coordinate descent from the last solution; each slope stays >= 0."""
        level = self._seconds / self._shapes
        typical = [level * share * unit for share, unit in zip(_SHAPE, _SCALES, strict=True)]
        if self.count == 1:
            self._slopes = list(typical)
        for _ in range(_SWEEPS):
            for i in range(3):
                others = sum(self._products[i][j] * self._slopes[j] for j in range(3) if j != i)
                above = self._targets[i] + _RIDGE * typical[i] - others
                self._slopes[i] = max(0.0, above / (self._products[i][i] + _RIDGE))


class StepCosts:
    """Predicted seconds of verification, drafting and catching up, each 0 before its first measurement."""

    def __init__(self) -> None:
        self._target, self._draft = CostFit(), CostFit()
        self._catch_up = (0.0, 0.0)

    def observe(self, work: StepWork) -> None:
        """Learn from a step; prompts beside the decodes would blur what a verified row costs."""
        if work.decodes_only and work.rows:
            self._target.observe((1, work.rows, work.row_context), _bucket(work.rows), work.target_seconds)
        if not work.draft_forwards:
            return
        if work.catch_up_rows < _LEAST_CATCH_UP_ROWS:
            features = (work.draft_forwards, work.draft_rows, work.draft_row_context)
            self._draft.observe(features, work.draft_forwards, work.draft_seconds)
        elif self._draft.count:  # else the price of its drafting would count as catching up
            self._observe_catch_up(work)

    def target_seconds(self, rows: int, context: float) -> float:
        """A step's seconds without drafting, for ``rows`` rows after ``context`` tokens on average."""
        return self._target.predict((1, rows, rows * context), _bucket(rows))

    def draft_seconds(self, forwards: float, rows: float, context: float) -> float:
        """Seconds of drafting with so many forwards and, in all of them, rows."""
        return self._draft.predict((forwards, rows, rows * context), round(forwards))

    def catch_up_seconds(self, tokens: int) -> float:
        """Seconds in which the draft model computes known tokens."""
        seconds, rows = self._catch_up
        each = seconds / rows if rows else _CATCH_UP_SHARE * self.draft_seconds(1, 1, 0)
        return each * tokens

    def _observe_catch_up(self, work: StepWork) -> None:
        drafting = max(work.draft_rows - work.catch_up_rows, work.draft_forwards)
        known = self.draft_seconds(work.draft_forwards, drafting, 0)  # reading the weights is no part of it
        seconds, rows = self._catch_up
        # The first forward carries both kinds of rows, so the rest may come out below zero; it costs something.
        rest = max(work.draft_seconds - known, 0.1 * work.draft_seconds)
        self._catch_up = (_KEEP * seconds + rest, _KEEP * rows + work.catch_up_rows)


def mean_context(contexts: Sequence[int]) -> float:
    """Tokens before a row, on average over the sequences."""
    return sum(contexts) / len(contexts) if contexts else 0.0


def _bucket(rows: int) -> int:
    if rows <= _EXACT_ROWS:
        return rows
    return _EXACT_ROWS + int(4 * log2(rows / _EXACT_ROWS)) + 1
