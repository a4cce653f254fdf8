"""What a load of requests per second makes of a replica: batch, latency, and how many replicas it takes.

Little's law: as many sequences decode as requests arrive in the time that decoding one takes. That time depends on the
batch, so that the batch is a fixed point. Prompts are computed on the same device and leave decoding the rest of its
time. Means only: arrivals are taken to be Poisson for the wait of a prompt, and bursts are left to ``utilization``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from paceline.server.planning.speculation import Step

#: Decode step of a batch of so many sequences, a real number >= 1.
Steps = Callable[[float], Step]
_BISECTIONS = 60
_MOST_REPLICAS = 1_000_000


@dataclass(frozen=True, slots=True)
class Requests:
    """What arrives: ``qps`` requests a second of so many tokens."""

    qps: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Goals:
    """Latencies that must be met, mean seconds; None is any."""

    ttft: float | None = None
    itl: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """One replica under a load that it bears.

    Attributes:
        qps: its share of the requests.
        batch: sequences that decode at once, on average; below 1 the replica is idle at times.
        step: the decode step at that batch.
        prefill_share: share of the device's time that prompts take.
        utilization: of the most requests per second that it bears.
        ttft, itl, latency: mean seconds to the first token, between tokens, and of a whole request.
    """

    qps: float
    batch: float
    step: Step
    prefill_share: float
    utilization: float
    ttft: float
    itl: float
    latency: float


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica's speeds.

    Attributes:
        steps: decode step by batch.
        limit: most sequences at once.
        prefill: seconds of one prompt.
    """

    steps: Steps
    limit: int
    prefill: float

    def most_qps(self, requests: Requests) -> float:
        """Requests per second at which the full batch and the prompts take all of its time."""
        rate = max(self._rate(self.limit), self._rate(1))
        return 1.0 / (requests.output_tokens / rate + self.prefill)

    def load(self, requests: Requests, qps: float) -> Load | None:
        """What ``qps`` requests per second make of it; None if it falls behind."""
        prefill_share = qps * self.prefill
        most = self.most_qps(requests)
        if qps >= most:
            return None
        left = 1.0 - prefill_share
        wanted = qps * requests.output_tokens / left
        batch = self._batch(wanted)
        step = self.steps(max(1.0, batch))
        itl = step.seconds / step.tau / left
        ttft = self._ttft(step, batch, prefill_share)
        return Load(
            qps, batch, step, prefill_share, qps / most, ttft, itl, ttft + itl * (requests.output_tokens - 1)
        )

    def _rate(self, batch: float) -> float:
        return self.steps(batch).tokens_per_second

    def _batch(self, wanted: float) -> float:
        """The mean batch that gives ``wanted`` tokens per second while it decodes."""
        if wanted <= self._rate(1.0):
            return wanted / self._rate(1.0)
        low, high = 1.0, float(self.limit)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._rate(middle) < wanted else (low, middle)
        return high

    def _ttft(self, step: Step, batch: float, prefill_share: float) -> float:
        """Half a step if one runs, the prompts before (M/D/1: rho / (2 (1 - rho)) of a prompt), and its own."""
        waiting = prefill_share / (2 * (1 - prefill_share))
        return min(1.0, batch) * step.seconds / 2 + self.prefill * (1 + waiting)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas that bear a load; each has an equal share. ``reason`` names what decided their number."""

    replicas: int
    load: Load
    reason: str


def fleet(replica: Replica, requests: Requests, goals: Goals, utilization: float) -> Fleet | str:
    """The fewest replicas under which each is used to at most ``utilization`` and every goal is met.

    Returns:
        The fleet, or why no number of replicas will do: what a single request meets on an idle one misses the goal.
    """
    least = max(1, math.ceil(requests.qps / (utilization * replica.most_qps(requests)) - 1e-9))
    idle = replica.load(requests, 1e-9)
    assert idle is not None
    if (missed := _missed(idle, goals)) is not None:
        return f"{missed} on an idle replica already"

    def good(replicas: int) -> bool:
        load = replica.load(requests, requests.qps / replicas)
        return load is not None and _missed(load, goals) is None

    if good(least):
        reason = "utilization"
        count = least
    else:
        reason = "latency goals"
        count = _first_good(good, least)
    load = replica.load(requests, requests.qps / count)
    if load is None or count > _MOST_REPLICAS:
        return f"more than {_MOST_REPLICAS} replicas would be needed"
    return Fleet(count, load, reason)


def _first_good(good: Callable[[int], bool], bad: int) -> int:
    """The least number above ``bad`` that is good: latencies fall as requests are spread more thinly."""
    high = 2 * bad
    while not good(high) and high <= _MOST_REPLICAS:
        bad, high = high, 2 * high
    while high - bad > 1:
        middle = (bad + high) // 2
        bad, high = (bad, middle) if good(middle) else (middle, high)
    return high


def _missed(load: Load, goals: Goals) -> str | None:
    for name, got, goal in (
        ("first token", load.ttft, goals.ttft),
        ("gap between tokens", load.itl, goals.itl),
    ):
        if goal is not None and got > goal:
            return f"{name} takes {got * 1e3:.1f} ms, over the goal of {goal * 1e3:g} ms"
    return None
