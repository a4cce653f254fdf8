"""Replaces "auto" by concrete values, once, before anything is built.

What depends on the models stays for the engine to decide: ``kv_cache_gib`` (None), and ``weights`` on the CPU ("auto"),
where the model loader measures which format is good enough.
"""

from dataclasses import replace
from typing import Literal

from paceline.server.config.machine import Machine
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig
from paceline.server.errors import ConfigError


def resolve(config: PacelineConfig, machine: Machine | None = None) -> PacelineConfig:
    """The same configuration with device, threads and, on CUDA, weights decided for ``machine`` (default: this one).

    Raises:
        ConfigError: CUDA is asked for where there is none, or something that only vLLM has.
    """
    if config.engine.kind == "vllm":  # which finds out about the machine itself
        return config
    if any(model.speculation.draft_schedule for model in config.models):
        raise ConfigError(
            "models.speculation.draft_schedule: for vLLM only; the native engine measures as it serves (policy = "
            '"adaptive")'
        )
    machine = machine or Machine()
    device = _device(config.engine, machine)
    threads = config.engine.threads or machine.usable_cores
    return replace(
        config,
        engine=replace(config.engine, device=device, threads=threads),
        models=tuple(replace(model, weights=_weights(model, device)) for model in config.models),
    )


def _device(engine: EngineConfig, machine: Machine) -> Literal["cpu", "cuda"]:
    if engine.device == "auto":
        return "cuda" if machine.cuda_available else "cpu"
    if engine.device == "cuda" and not machine.cuda_available:
        raise ConfigError("engine.device: torch sees no CUDA device; use --device cpu or a torch with CUDA")
    return engine.device


def _weights(model: ModelSpec, device: str) -> Literal["auto", "fp32", "bf16", "int8"]:
    return "bf16" if model.weights == "auto" and device == "cuda" else model.weights
