"""Seconds that the parts of a step take: measured online, predicted for widths not tried lately.

Each fit is a non-negative linear function of three features by least squares, times measured / predicted per bucket,
times a speed that all share. The line extrapolates; the buckets know the steps of the kernels (a tile more, another
path for one row), and what a bucket has shown fades with its own observations only: while a sequence drafts in every
step, nothing else tells what a single row costs. The speed is the machine's of the moment, and quick to learn. A ridge
towards a typical shape decides only what the data leave open, such as the price of a second row while only single rows
ran.
"""

from collections.abc import Sequence
from math import log2

from paceline.server.decoding.policy.choices import StepWork

#: Forgetting per observation of the same bucket: its last 50 or so count.
_KEEP = 0.98
#: How far one observation moves the speed, and how many a bucket must have before what it says is about speed.
_SPEED_GAIN = 0.1
_SETTLED = 8.0
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
#: Rows up to here have a bucket each, more share four per doubling; steps after drafting ones have their own.
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


class _Evidence:
    """What one bucket has seen: sums for the fit, and measured / line; both fade with its own observations only."""

    __slots__ = ("level", "products", "ratio", "shape", "targets", "weight")

    def __init__(self) -> None:
        self.products = [[0.0] * 3 for _ in range(3)]
        self.targets = [0.0] * 3
        self.level = self.shape = 0.0
        self.ratio = self.weight = 0.0

    def add(self, scaled: list[float], seconds: float, weight: float) -> None:
        """Scaled features and what they took."""
        for row, x in zip(self.products, scaled, strict=True):
            for j in range(3):
                row[j] = _KEEP * row[j] + weight * x * scaled[j]
        self.targets = [_KEEP * t + weight * x * seconds for t, x in zip(self.targets, scaled, strict=True)]
        shape = sum(x * unit * share for x, unit, share in zip(scaled, _SCALES, _SHAPE, strict=True))
        self.level, self.shape = _KEEP * self.level + weight * seconds, _KEEP * self.shape + weight * shape

    def compare(self, ratio: float) -> None:
        """One more measured / line."""
        self.ratio, self.weight = _KEEP * self.ratio + ratio, _KEEP * self.weight + 1

    def mean_ratio(self) -> float:
        """Measured / line, 1 where nothing is known."""
        return (self.ratio + _BUCKET_PRIOR) / (self.weight + _BUCKET_PRIOR)


class CostFit:
    """See the module docstring; features are (calls, rows, row x context tokens)."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets: dict[int, _Evidence] = {}
        self._slopes = [0.0] * 3
        self._rates = (0.0, 0.0, 0.0)  # seconds per call, row and row x context token
        self._speed = 1.0

    def predict(self, features: _Features, bucket: int) -> float:
        """Seconds; 0 before the first observation."""
        known = self._buckets.get(bucket)
        seconds = self._line(features) * self._speed
        return seconds if known is None else seconds * known.mean_ratio()

    def observe(self, features: _Features, bucket: int, seconds: float) -> None:
        """Learn from one measurement."""
        if self.count >= _TRUSTED:
            seconds = min(seconds, _OUTLIER * self.predict(features, bucket))
        known = self._buckets.setdefault(bucket, _Evidence())
        scaled = [x / unit for x, unit in zip(features, _SCALES, strict=True)]
        known.add(scaled, seconds / self._speed, 1.0 if self.count else _FIRST_WEIGHT)
        self.count += 1
        if self.count <= 2 * _TRUSTED or self.count % _SOLVE_EVERY == 0:
            self._solve()
        if self.count <= _TRUSTED or (line := self._line(features)) <= 0:
            return
        if known.weight >= _SETTLED:
            self._speed *= 1 + _SPEED_GAIN * (seconds / (line * self._speed * known.mean_ratio()) - 1)
        known.compare(seconds / (line * self._speed))

    def _line(self, features: _Features) -> float:
        calls, rows, row_context = features
        per_call, per_row, per_context = self._rates
        return calls * per_call + rows * per_row + row_context * per_context

    def _solve(self) -> None:
        """Coordinate descent from the last solution; each slope stays >= 0."""
        known = self._buckets.values()
        level = sum(k.level for k in known) / sum(k.shape for k in known)
        typical = [level * share * unit for share, unit in zip(_SHAPE, _SCALES, strict=True)]
        products = [[sum(k.products[i][j] for k in known) for j in range(3)] for i in range(3)]
        targets = [sum(k.targets[i] for k in known) for i in range(3)]
        if self.count == 1:
            self._slopes = list(typical)
        for _ in range(_SWEEPS):
            for i in range(3):
                others = sum(products[i][j] * self._slopes[j] for j in range(3) if j != i)
                above = targets[i] + _RIDGE * typical[i] - others
                self._slopes[i] = max(0.0, above / (products[i][i] + _RIDGE))
        calls, rows, row_context = (slope / unit for slope, unit in zip(self._slopes, _SCALES, strict=True))
        self._rates = calls, rows, row_context


class StepCosts:
    """Predicted seconds of verification, drafting and catching up, each 0 before its first measurement."""

    def __init__(self) -> None:
        self._target, self._draft = CostFit(), CostFit()
        self._catch_up = (0.0, 0.0)
        self._has_drafted = False  # in the step before

    def observe(self, work: StepWork) -> None:
        """Learn from a step; prompts beside the decodes would blur what a verified row costs."""
        after, self._has_drafted = self._has_drafted, work.draft_forwards > 0
        if work.decodes_only and work.rows:
            bucket = _bucket(work.rows, after)
            self._target.observe((1, work.rows, work.row_context), bucket, work.target_seconds)
        if not work.draft_forwards:
            return
        if work.catch_up_rows < _LEAST_CATCH_UP_ROWS:
            features = (work.draft_forwards, work.draft_rows, work.draft_row_context)
            self._draft.observe(features, work.draft_forwards, work.draft_seconds)
        elif self._draft.count:  # else the price of its drafting would count as catching up
            self._observe_catch_up(work)

    def target_seconds(self, rows: int, context: float, *, drafting: bool) -> float:
        """A step's seconds without drafting, for ``rows`` rows after ``context`` tokens on average.

        Args:
            drafting: whether a draft model runs in every step: it takes room in the caches, so that the step after
                one that drafted is slower (SmolLM2 on a Xeon: one row 4.3 -> 5.0 ms). What is weighed is the one
                state against the other, not a single step.
        """
        return self._target.predict((1, rows, rows * context), _bucket(rows, drafting))

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


def _bucket(rows: int, after_draft: bool) -> int:
    exact = rows if rows <= _EXACT_ROWS else _EXACT_ROWS + int(4 * log2(rows / _EXACT_ROWS)) + 1
    return 2 * exact + after_draft
