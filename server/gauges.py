"""What is true of an engine at the moment of a scrape: its state, its queues, its KV blocks, what it serves.

A collector of ``metrics``; reads the engine by its interface and keeps nothing. Label ``model_name`` on everything but
the engine's state, which is the process's and is there before any model.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.server.engine.interface import AsyncEngine, EngineState, Load, ModelInfo


class EngineGauges(Collector):
    """See the module's docstring."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The gauges, read now."""
        yield _state(self._engine.state)
        yield from _queues(self._engine.loads(), self._engine.kv_usage())
        yield from _models(dict(self._engine.models).values())


def _state(now: EngineState) -> Metric:
    family = GaugeMetricFamily(
        "paceline:engine_state", "1 for the state that the engine is in, 0 for the others.", labels=["state"]
    )
    for state in get_args(EngineState):
        family.add_metric([state], state == now)
    return family


def _queues(loads: Mapping[str, Load], kv_usage: float) -> Iterator[Metric]:
    running = {model: load.running for model, load in loads.items()}
    waiting = {model: load.waiting for model, load in loads.items()}
    yield _per_model("vllm:num_requests_running", "Choices in the batch.", running)
    yield _per_model("vllm:num_requests_waiting", "Choices in the queue.", waiting)
    # One budget serves all models, so each of them shows the same share.
    shares = dict.fromkeys(loads, kv_usage)
    yield _per_model("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", shares)


def _models(models: Iterable[ModelInfo]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "paceline:model_info",
        "Models served; always 1.",
        labels=["model_name", "engine", "weights", "pattern", "draft"],
    )
    sparsity = GaugeMetricFamily(
        "paceline:model_sparsity",
        "Share of the weights of the blocks' linears that are left out, 0 to 1.",
        labels=["model_name"],
    )
    for model in models:
        weights = model.weights
        draft = model.default_draft or "none"
        info.add_metric([model.name, model.engine, weights.format, weights.pattern, draft], 1)
        sparsity.add_metric([model.name], weights.sparsity)
    yield info
    yield sparsity


def _per_model(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["model_name"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family
