"""Prometheus metrics: the de-facto standard ``vllm:`` names and our own, in a registry of their own.

``Metrics`` is the engine's observer: the engine thread counts into it while HTTP threads render it. Counters
and histograms only; gauges are read from the engine when somebody scrapes (``gauges``). Label ``model_name``
everywhere but on what counts HTTP responses: a request that is refused may name no model.
Times are seconds, lengths tokens.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

from paceline.server.decoding.policy import Reason
from paceline.server.engine.interface import AsyncEngine, ModelInfo, RequestStats, StepStats
from paceline.server.gauges import EngineGauges

PHASES: Final = ("schedule", "draft", "forward", "sample", "commit")
FINISHED_REASONS: Final = ("stop", "length", "abort", "error")

_STEP_BUCKETS: Final = (
    1e-5,
    1e-4,
    5e-4,
    1e-3,
    2.5e-3,
    5e-3,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
_INTER_TOKEN_BUCKETS: Final = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_FIRST_TOKEN_BUCKETS: Final = (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUEST_BUCKETS: Final = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    40.0,
    60.0,
    120.0,
    300.0,
    900.0,
)


class Metrics:
    """All metrics of one server process; implements ``EngineObserver``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._speculation = _SpeculationMetrics(self._registry)
        self._tokens = _TokenMetrics(self._registry)
        self._latency = _LatencyMetrics(self._registry)
        # Filled by the features that bring drafts in and out at run time.
        _gauge(self._registry, "paceline:draft_info", "Drafts in use; always 1.", "draft", "version")
        _counter(self._registry, "paceline:draft_swaps", "Changes of the serving draft.", "result")
        self._steered = _counter(
            self._registry, "paceline:steering_requests", "Finished choices that steering changed."
        )
        self._responses = Counter(
            "paceline:http_responses",
            "HTTP responses, by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._engine: AsyncEngine | None = None
        self._others: Callable[[], Iterable[Metric]] = tuple

    def include(self, others: Callable[[], Iterable[Metric]]) -> None:
        """Export somebody else's metrics beside these from now on; where names are the same, only these."""
        self._others = others

    def attach(self, engine: AsyncEngine) -> None:
        """Read the gauges from ``engine`` from now on; attaching the same engine again changes nothing."""
        if self._engine is engine:
            return
        assert self._engine is None, "one Metrics serves one engine"
        self._engine = engine
        self._registry.register(EngineGauges(engine))

    def on_step(self, stats: StepStats) -> None:
        """Count one engine step."""
        self._tokens.add(stats)
        self._speculation.add(stats)

    def on_request(self, stats: RequestStats) -> None:
        """Count one finished choice."""
        self._latency.add(stats)
        if stats.steered:
            self._steered.labels(stats.model).inc()

    def on_response(self, endpoint: str, status: int) -> None:
        """Count one HTTP response."""
        self._responses.labels(endpoint, str(status)).inc()

    def touch_responses(self, endpoint: str, status: int) -> None:
        """Export the count of such responses before there is one."""
        self._responses.labels(endpoint, str(status))

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        for model in dict(self._engine.models).values() if self._engine is not None else ():
            self._start_at_zero(model)
        return generate_latest(_Merged(self._registry, self._others))

    def _start_at_zero(self, model: ModelInfo) -> None:
        """Export a model's series before anything has happened: a rate needs the first step from 0."""
        self._tokens.touch(model.name)
        self._speculation.touch(model.name, model.max_draft_tokens)
        self._latency.touch(model.name)
        if model.steering is not None:
            self._steered.labels(model.name)


class _Merged:
    """A registry's metrics, then those of ``others`` whose names it does not have; what ``generate_latest`` reads."""

    def __init__(self, registry: CollectorRegistry, others: Callable[[], Iterable[Metric]]) -> None:
        self._registry, self._others = registry, others

    def collect(self) -> Iterator[Metric]:
        seen = set[str]()
        for metric in (*self._registry.collect(), *self._others()):
            if metric.name not in seen:
                seen.add(metric.name)
                yield metric


class _TokenMetrics:
    """Tokens, prefix cache, preemptions and step times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._prompt = _counter(registry, "vllm:prompt_tokens", "Prompt tokens computed.")
        self._generated = _counter(registry, "vllm:generation_tokens", "Tokens generated.")
        self._queries = _counter(
            registry, "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._hits = _counter(registry, "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = _counter(
            registry, "vllm:num_preemptions", "Sequences put back because blocks ran out."
        )
        self._step_seconds = _histogram(
            registry, "paceline:step_seconds", "Time of one engine step, by phase.", _STEP_BUCKETS, "phase"
        )

    def add(self, stats: StepStats) -> None:
        self._prompt.labels(stats.model).inc(stats.prompt_tokens)
        self._generated.labels(stats.model).inc(stats.generated_tokens)
        self._queries.labels(stats.model).inc(stats.prefix_queries)
        self._hits.labels(stats.model).inc(stats.prefix_hits)
        self._preemptions.labels(stats.model).inc(stats.preemptions)
        for phase, seconds in stats.phase_seconds.items():
            self._step_seconds.labels(stats.model, phase).observe(seconds)

    def touch(self, model: str) -> None:
        for counter in (self._prompt, self._generated, self._queries, self._hits, self._preemptions):
            counter.labels(model)
        for phase in PHASES:
            self._step_seconds.labels(model, phase)


class _SpeculationMetrics:
    """Drafted and accepted tokens; alpha, tau and rates are queries over these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._drafts = _counter(registry, "vllm:spec_decode_num_drafts", "Draft blocks verified.")
        self._drafted = _counter(registry, "vllm:spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._accepted = _counter(registry, "vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._per_position = _counter(
            registry,
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by position in their block (from 0).",
            "position",
        )
        self._disabled = _counter(
            registry, "paceline:spec_disabled", "Sequences that went without speculation in a step.", "reason"
        )  # reasons: ``decoding.policy.Reason``

    def add(self, stats: StepStats) -> None:
        for reason, count in collections.Counter(stats.disabled).items():
            self._disabled.labels(stats.model, reason).inc(count)
        if not stats.accepted_per_block:
            return
        self._drafts.labels(stats.model).inc(len(stats.accepted_per_block))
        self._drafted.labels(stats.model).inc(sum(stats.drafted_per_block))
        self._accepted.labels(stats.model).inc(sum(stats.accepted_per_block))
        for position in range(max(stats.accepted_per_block)):
            reached = sum(accepted > position for accepted in stats.accepted_per_block)
            self._per_position.labels(stats.model, str(position)).inc(reached)

    def touch(self, model: str, max_draft_tokens: int) -> None:
        for counter in (self._drafts, self._drafted, self._accepted):
            counter.labels(model)
        for position in range(max_draft_tokens):
            self._per_position.labels(model, str(position))
        for reason in get_args(Reason) if max_draft_tokens else ():
            self._disabled.labels(model, reason)


class _LatencyMetrics:
    """Finished choices and their times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._finished = _counter(
            registry, "vllm:request_success", "Finished choices, by reason.", "finished_reason"
        )
        self._first_token = _histogram(
            registry,
            "vllm:time_to_first_token_seconds",
            "Arrival to first token.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = _histogram(
            registry,
            "vllm:inter_token_latency_seconds",
            "Time per token after the first.",
            _INTER_TOKEN_BUCKETS,
        )
        self._total = _histogram(
            registry, "vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS
        )
        self._queue = _histogram(
            registry,
            "vllm:request_queue_time_seconds",
            "Time spent waiting to be scheduled.",
            _REQUEST_BUCKETS,
        )

    def add(self, stats: RequestStats) -> None:
        self._finished.labels(stats.model, stats.finished_reason).inc()
        self._queue.labels(stats.model).observe(stats.queue_seconds)
        self._total.labels(stats.model).observe(stats.total_seconds)
        if stats.first_token_seconds is not None:
            self._first_token.labels(stats.model).observe(stats.first_token_seconds)
        inter_token = self._inter_token.labels(stats.model)
        for seconds in stats.inter_token_seconds:
            inter_token.observe(seconds)

    def touch(self, model: str) -> None:
        for histogram in (self._first_token, self._inter_token, self._total, self._queue):
            histogram.labels(model)
        for reason in FINISHED_REASONS:
            self._finished.labels(model, reason)


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, ["model_name", *labels], registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, ["model_name", *labels], registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...], *labels: str
) -> Histogram:
    return Histogram(name, text, ["model_name", *labels], buckets=buckets, registry=registry)
