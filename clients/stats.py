"""From single requests to the figures of a load test: pure functions of numbers.

Owns what is measured (``Sample``) and how it is summed up (``LevelStats``). It must not know HTTP or how the
samples were obtained. Times inside are seconds; what is reported is milliseconds and tokens per second.

* TTFT: request sent -> first chunk that carries a token.
* Inter-token latency: the gap between two chunks divided by the tokens of the later one, counted once per
  token, so that a server which sends several tokens in one chunk (speculation) is judged fairly.
* TPOT (time per output token): mean of a request's inter-token latencies. A server that speculates and sends its
  tokens in bursts of chunks has a median inter-token latency near 0; this figure tells what its tokens cost.
* A percentile is the nearest rank. For tokens/s per request p99 is the slow tail: 99% are at least this fast.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: Where token counts came from, best first: a running count in each chunk, the final total, one per chunk.
CountedBy = Literal["continuous_usage", "usage", "chunks"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request's outcome; ``error`` set means that it failed and its other figures do not count.

    Attributes:
        started_s: clock reading when the request was sent, comparable between samples of one run.
        ttft_s: None if no token came.
        token_gaps: (seconds per token, tokens) for every chunk after the first.
    """

    started_s: float
    e2e_s: float
    ttft_s: float | None = None
    token_gaps: tuple[tuple[float, float], ...] = ()
    output_tokens: int = 0
    prompt_tokens: int = 0
    counted_by: CountedBy = "chunks"
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Median and tail; None where nothing was measured."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class LevelStats:
    """One load level. ``output_tok_s`` is all generated tokens over the level's wall time."""

    level: str
    requests: int
    errors: int
    error_messages: dict[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tok_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    request_tok_s: Percentiles
    counted_by: tuple[CountedBy, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain containers, ready for ``json.dumps``."""
        return asdict(self)


def weighted_percentile(pairs: Iterable[tuple[float, float]], q: float) -> float | None:
    """The smallest value at which at least share ``q`` (0..1) of all weight is reached; None without weight.

    Args:
        pairs: (value, weight) in any order.
        q: share of the weight, 0.5 is the median.
    """
    ordered = sorted(pair for pair in pairs if pair[1] > 0)
    wanted = q * sum(weight for _, weight in ordered)
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= wanted - 1e-9:
            return value
    return None


def _percentiles(
    pairs: Sequence[tuple[float, float]], scale: float, *, slow_is_small: bool = False
) -> Percentiles:
    """Median and tail of weighted values, times ``scale``; the tail is the slow side."""
    median = weighted_percentile(pairs, 0.5)
    tail = weighted_percentile([(-v, w) for v, w in pairs], 0.99) if slow_is_small else None
    tail = -tail if tail is not None else weighted_percentile(pairs, 0.99)
    if median is None or tail is None:
        return Percentiles(None, None)
    return Percentiles(round(median * scale, 3), round(tail * scale, 3))


def _ones(values: Iterable[float]) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in values]


def _has_gaps(sample: Sample) -> bool:
    return any(count > 0 for _, count in sample.token_gaps)


def _mean_gap_s(sample: Sample) -> float:
    """Seconds per token after the first chunk."""
    return sum(gap * count for gap, count in sample.token_gaps) / sum(count for _, count in sample.token_gaps)


def summarize(level: str, samples: Sequence[Sample]) -> LevelStats:
    """Sum up one level; ``level`` is its name in the table, such as ``"8"`` or ``"2.5/s"``."""
    good = [sample for sample in samples if sample.error is None]
    start = min((sample.started_s for sample in samples), default=0.0)
    duration_s = max((sample.started_s + sample.e2e_s for sample in samples), default=0.0) - start
    output_tokens = sum(sample.output_tokens for sample in good)
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    return LevelStats(
        level=level,
        requests=len(samples),
        errors=sum(errors.values()),
        error_messages=dict(errors.most_common(5)),
        duration_s=round(duration_s, 4),
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        output_tokens=output_tokens,
        output_tok_s=round(output_tokens / duration_s, 3) if duration_s else 0.0,
        ttft_ms=_percentiles(_ones(s.ttft_s for s in good if s.ttft_s is not None), 1000),
        itl_ms=_percentiles([gap for sample in good for gap in sample.token_gaps], 1000),
        tpot_ms=_percentiles(_ones(map(_mean_gap_s, filter(_has_gaps, good))), 1000),
        e2e_ms=_percentiles(_ones(sample.e2e_s for sample in good), 1000),
        request_tok_s=_percentiles(
            _ones(s.output_tokens / s.e2e_s for s in good if s.output_tokens and s.e2e_s),
            1,
            slow_is_small=True,
        ),
        counted_by=tuple(sorted({sample.counted_by for sample in good})),
    )
