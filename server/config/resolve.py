"""Replaces "auto" by concrete values, once, before anything is built.

``kv_cache_gib`` stays None: it depends on the loaded models' sizes, which only the engine knows.
"""

from dataclasses import replace
from typing import Literal

from paceline.server.config.machine import Machine
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig
from paceline.server.errors import ConfigError


def resolve(config: PacelineConfig, machine: Machine | None = None) -> PacelineConfig:
    """The same configuration with device, threads and weights decided for ``machine`` (default: this one).

    Raises:
        ConfigError: CUDA is asked for where there is none.
    """
    machine = machine or Machine()
    device = _device(config.engine, machine)
    threads = config.engine.threads or machine.usable_cores
    return replace(
        config,
        engine=replace(config.engine, device=device, threads=threads),
        models=tuple(replace(model, weights=_weights(model, device, machine)) for model in config.models),
    )


def _device(engine: EngineConfig, machine: Machine) -> Literal["cpu", "cuda"]:
    if engine.device == "auto":
        return "cuda" if machine.cuda_available else "cpu"
    if engine.device == "cuda" and not machine.cuda_available:
        raise ConfigError("engine.device: torch sees no CUDA device; use --device cpu or a torch with CUDA")
    return engine.device


def _weights(model: ModelSpec, device: str, machine: Machine) -> Literal["fp32", "bf16"]:
    if model.weights != "auto":
        return model.weights
    return "bf16" if device == "cuda" or machine.cpu_computes_bf16 else "fp32"
