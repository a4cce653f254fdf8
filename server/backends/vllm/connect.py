"""The only module that imports vLLM: engine arguments checked against the installed one, ``AsyncLLM`` started.

Import it from a thread when vLLM is really wanted: that alone takes seconds.
"""

import difflib
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from prometheus_client import Metric
from pydantic import ValidationError
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import get_prometheus_registry

from paceline.server.errors import ConfigError, UserError

#: Told about each step: scheduler's statistics, frontend's statistics, engine core.
OnStep = Callable[[Any, Any, int], None]


def device_type() -> str:
    """What the installed vLLM runs on: "cpu", "cuda", ..."""
    return str(current_platform.device_type)


def check_names(names: Iterable[str], place: str) -> None:
    """Refuse arguments that this vLLM does not have.

    Raises:
        ConfigError: names the nearest one that it has.
    """
    known = [field.name for field in fields(AsyncEngineArgs) if field.init and not field.name.startswith("_")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "see vLLM's engine arguments"
            raise ConfigError(f"{place}.{name}: vLLM has no such engine argument; {hint}")


def start(arguments: Mapping[str, Any], on_step: OnStep) -> AsyncLLM:
    """vLLM's engine with its processes; blocks until the model is loaded.

    Raises:
        ConfigError: arguments that vLLM refuses.
        UserError: it could not start; its own log says why.
    """
    try:
        engine_arguments = AsyncEngineArgs(**arguments)
        config = engine_arguments.create_engine_config()
    except (ValidationError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"engine.vllm: vLLM refuses these arguments: {_reason(error)}") from error
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[lambda _config, _core=0: _Logger(on_step)])
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"vLLM did not start: {_reason(error)}; its messages above say more") from error


def make_params(arguments: Mapping[str, Any]) -> SamplingParams:
    """``SamplingParams`` for new tokens as they come."""
    return SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)


def is_client_error(error: Exception) -> bool:
    """Whether the request is at fault."""
    return isinstance(error, VLLMClientError)


def metrics() -> list[Metric]:
    """vLLM's own metrics, and nothing else of the process's."""
    return [metric for metric in get_prometheus_registry().collect() if metric.name.startswith("vllm:")]


def kill_processes() -> None:
    """End what vLLM has started, without waiting."""
    for child in multiprocessing.active_children():
        child.kill()


class _Logger:
    """A stat logger as vLLM calls it."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._on_step(scheduler_stats, iteration_stats, engine_idx)

    def log(self) -> None:
        """Paceline logs no figures."""

    def log_engine_initialized(self) -> None:
        """Nor how it began."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """It never sleeps."""


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(": ".join((*map(str, e["loc"]), e["msg"])) for e in error.errors())
    return " ".join(str(error).split()) or type(error).__name__
