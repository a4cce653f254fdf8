"""Checkpoint -> weights ready to run: torch modules, or a packed plan for the CPU executor.

Equal checkpoints in equal formats are loaded once and shared. Owns nothing of requests or KV.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import DecoderPlan
from paceline.kernels.cpu.library import KernelsMissing, Pool, library
from paceline.kernels.cpu.memory import compact
from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.checkpoint import Checkpoint, open_checkpoint
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.llama import Decoder
from paceline.server.models.packed_cache import PackedCache
from paceline.server.models.plan import PlanBuilder

_log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Weights = Literal["fp32", "bf16", "int8"]
#: Called with (tensors done, tensors in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """Weights with what identifies them.

    Attributes:
        key: equal for equal weights in equal form; what may share cached KV.
        kv_dtype: how K and V are stored.
        weights: torch modules, or the plan of the CPU executor.
    """

    key: str
    path: Path
    config: ModelConfig
    kv_dtype: torch.dtype
    weights: Decoder | DecoderPlan


class ModelLoader:
    """Loads models and remembers them, so that a checkpoint named twice is in memory once.

    Args:
        device: where torch modules go.
        pool: threads of the CPU kernels; None runs torch modules.
        on_progress: called as tensors are read.
    """

    def __init__(
        self, device: torch.device, pool: Pool | None = None, *, on_progress: Progress | None = None
    ) -> None:
        self._device, self._pool = device, pool
        self._on_progress = on_progress or (lambda done, total: None)
        self._loaded: dict[tuple[Path, str], LoadedModel] = {}

    def load(self, path: Path, weights: Weights) -> LoadedModel:
        """Load a Hugging Face folder or a GGUF file.

        Raises:
            UnsupportedModelError: an architecture that the native engine does not run.
            ArtifactError: missing or misshapen tensors.
            ConfigError: int8 without the CPU kernels.
        """
        key = (path.resolve(), weights)
        if key not in self._loaded:
            self._loaded[key] = self._read(path, weights)
        return self._loaded[key]

    def _read(self, path: Path, weights: Weights) -> LoadedModel:
        checkpoint = open_checkpoint(path)
        config = parse_model_config(checkpoint.hf_config, where=str(path))
        kv_dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        sha = checkpoint.weights_sha256()
        if self._pool is None:
            if weights == "int8":
                raise ConfigError(
                    "--weights int8 needs the native CPU kernels (see paceline info); use bf16 or fp32"
                )
            fetch = _Fetcher(checkpoint, config, DTYPES[weights], self._device, self._on_progress)
            return LoadedModel(
                f"{sha}/torch-{weights}", path, config, kv_dtype, Decoder(config, fetch).eval()
            )
        plan = self._plan(checkpoint, config, sha, weights, self._pool)
        return LoadedModel(f"{sha}/cpu-{weights}-{self._pool.isa}", path, config, kv_dtype, plan)

    def _plan(
        self, checkpoint: Checkpoint, config: ModelConfig, sha: str, weights: Weights, pool: Pool
    ) -> DecoderPlan:
        cache = (
            PackedCache(sha, weights) if weights == "int8" else None
        )  # the others pack as fast as they read
        plan = cache.load(config) if cache is not None else None
        if plan is None:
            fetch = _Fetcher(checkpoint, config, torch.float32, torch.device("cpu"), self._on_progress)
            plan = PlanBuilder(config, fetch, pool, weights).build()
            if cache is not None:
                cache.save(plan)
        return compact(plan)


def kernels_wanted(device: str) -> bool:
    """Whether the native CPU kernels run the models; ``PACELINE_KERNELS=torch`` switches them off.

    Warns once if they are wanted and missing.
    """
    if device != "cpu" or os.environ.get("PACELINE_KERNELS") == "torch":
        return False
    try:
        library()
    except (KernelsMissing, OSError) as error:
        _log.warning("running on torch instead of the CPU kernels: %s", error)
        return False
    return True


class _Fetcher:
    """Hands checkpoint tensors out in the right dtype, on the right device, shapes checked."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._dtype, self._device = dtype, device
        self._names = frozenset(checkpoint.tensor_names())
        self._progress, self._done = progress, 0

    def __call__(self, name: str) -> Tensor:
        if name not in self._names:
            raise ArtifactError(f"{self._checkpoint.path}: tensor {name} is missing")
        tensor = self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)
        expected = self._config.tensor_shape(name)
        if tuple(tensor.shape) != expected:
            raise ArtifactError(
                f"{self._checkpoint.path}: tensor {name} is {tuple(tensor.shape)}, "
                f"but the configuration says {expected}"
            )
        self._done += 1
        self._progress(self._done, len(self._names))
        return tensor
