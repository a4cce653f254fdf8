"""Checkpoint -> weights ready to run: torch modules, or a packed plan for the CPU executor.

Equal checkpoints in equal formats are loaded once and shared. Owns nothing of requests or KV.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from paceline.kernels import dispatch
from paceline.kernels.cpu.library import IsaUnavailable, Pool, best_isa
from paceline.kernels.cpu.memory import compact
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.dispatch import native_missing
from paceline.server.config.machine import Machine
from paceline.server.errors import ConfigError
from paceline.server.models import config_note
from paceline.server.models.auto_weights import decide
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig, parse_model_config, restricted
from paceline.server.models.llama import Decoder
from paceline.server.models.native_form import NativeCheckpoint, draft_vocab, is_native_form, open_model
from paceline.server.models.packed_cache import PackedCache
from paceline.server.models.packer import CONFIG, PackedFormat, Packer
from paceline.server.models.progress import Progress, default_progress
from paceline.server.models.sparsity import Sparsity, sparsity
from paceline.server.models.tensors import CheckedTensors

_log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Weights = Literal["auto", "fp32", "bf16", "int8"]


@dataclass(frozen=True)
class LoadedModel:
    """Weights with what identifies them.

    Attributes:
        key: equal for equal weights in equal form; what may share cached KV.
        weights_sha256: of the checkpoint.
        kv_dtype: how K and V are stored.
        format: "fp32", "bf16", "int8" or "mixed".
        sparsity: of the checkpoint.
        weights: torch modules, or the plan of the CPU executor.
    """

    key: str
    weights_sha256: str
    path: Path
    config: ModelConfig
    kv_dtype: torch.dtype
    weights: Decoder | DecoderPlan
    format: str
    sparsity: Sparsity


class ModelLoader:
    """Loads models and remembers them, so that a checkpoint named twice is in memory once.

    Attributes:
        device: where torch modules go.
        pool: threads of the CPU kernels; None runs torch modules.

    Args:
        progress: where quantizing shows itself; None is a bar on a terminal and log lines elsewhere.
    """

    def __init__(
        self, device: torch.device, pool: Pool | None = None, *, progress: Progress | None = None
    ) -> None:
        self.device, self.pool = device, pool
        self._progress = progress or default_progress()
        self._loaded: dict[tuple[Path, str, Path | None], LoadedModel] = {}

    def load(
        self, path: Path, weights: Weights, *, target: Path | None = None, fleeting: bool = False
    ) -> LoadedModel:
        """Load a Hugging Face folder, a GGUF file or an artifact in native form.

        Args:
            weights: "auto" with the CPU kernels is the fastest format that meets the quality bar; with torch bf16
                where the device computes in it, else fp32. An artifact that is stored in int8 runs in int8 on the
                CPU kernels whatever this says: other formats would read more bytes for the same values.
            target: for a draft, the model it drafts for; an artifact may take tensors from it.
            fleeting: what is there will change (a draft in training): it is read anew each time, and not packed for
                later starts.

        Raises:
            UnsupportedModelError: an architecture or format that the native engine does not run.
            ArtifactError: missing or misshapen tensors, or an artifact that was made for another target.
            ConfigError: int8 without the CPU kernels.
        """
        # Only an artifact depends on its target: a plain draft of two targets is loaded once.
        needed = target if is_native_form(path) else None
        key = (path.resolve(), weights, needed and needed.resolve())
        if fleeting:
            return self._read(path, weights, needed, fleeting=True)
        if key not in self._loaded:
            self._loaded[key] = self._read(path, weights, needed, fleeting=False)
        return self._loaded[key]

    def _read(self, path: Path, weights: Weights, target: Path | None, *, fleeting: bool) -> LoadedModel:
        checkpoint = open_model(path, None if target is None else open_model(target))
        sha256 = checkpoint.weights_sha256()
        config = _known_config(checkpoint, sha256)
        if self.pool is None:
            return self._torch(checkpoint, config, sha256, weights, target, fleeting)
        packer = Packer(checkpoint, config, self.pool, self._progress, sha256, cached=not fleeting)
        weights = _draft_weights(checkpoint, config, weights)
        if weights != "auto":
            return self._native(packer, weights, ())
        decision = decide(packer)
        _log.info("weights auto: %s", decision)
        if decision.format == "mixed":
            return self._native(packer, "mixed", decision.kept)
        # Shared with whoever names the format.
        return self.load(path, decision.format, target=target, fleeting=fleeting)

    def _torch(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        sha256: str,
        weights: Weights,
        target: Path | None,
        fleeting: bool,
    ) -> LoadedModel:
        if weights == "int8":
            raise ConfigError(
                "--weights int8 needs the native CPU kernels (see paceline info); use bf16 or fp32"
            )
        if weights == "auto":
            computes_bf16 = self.device.type == "cuda" or Machine().cpu_computes_bf16
            known: Weights = "bf16" if computes_bf16 else "fp32"
            return self.load(checkpoint.path, known, target=target, fleeting=fleeting)
        dtype = DTYPES[weights]
        fetch = CheckedTensors(checkpoint, config, dtype, self.device)
        key = f"{sha256}/torch-{weights}"
        decoder = Decoder(config, fetch, stored_sparse=fetch.sparse, vocab_ids=draft_vocab(checkpoint))
        left_out = sparsity(checkpoint, config)
        return LoadedModel(
            key, sha256, checkpoint.path, config, dtype, decoder.eval(), format=weights, sparsity=left_out
        )

    def _native(self, packer: Packer, format: PackedFormat, kept: Sequence[str]) -> LoadedModel:
        plan = compact(packer.plan(format, kept))
        name = "+".join([format, *kept]).replace(" ", "-")
        kv_dtype = torch.float32 if format == "fp32" else torch.bfloat16
        key = f"{packer.sha256}/cpu-{name}-{packer.pool.isa}"
        path, config = packer.checkpoint.path, packer.config
        left_out = sparsity(packer.checkpoint, config)
        return LoadedModel(key, packer.sha256, path, config, kv_dtype, plan, format=format, sparsity=left_out)


def _known_config(checkpoint: Checkpoint, sha256: str) -> ModelConfig:
    """Noted beside the packed weights, or parsed."""
    known = config_note.restore(PackedCache(sha256, "int8").note(CONFIG), checkpoint.hf_config)
    config = known or parse_model_config(checkpoint.hf_config, where=str(checkpoint.path))
    return restricted(config, draft_vocab(checkpoint))


def _draft_weights(checkpoint: Checkpoint, config: ModelConfig, weights: Weights) -> Weights:
    """What ``weights`` means for the CPU kernels, once it is known what is stored.

    "auto" cannot measure on text what knows few ids or needs a target's states. It takes int8: a draft's rounding costs
    a little acceptance and never changes the output.
    """
    reason = None
    if isinstance(checkpoint, NativeCheckpoint) and checkpoint.in_int8:
        reason = "is stored in int8"
    elif weights == "auto" and config.reads_state:
        reason = "reads its target's states"
    elif weights == "auto" and config.head_rows < config.vocab_size:
        reason = "has a restricted vocabulary"
    if reason is None or weights == "int8":
        return weights
    _log.info("weights %s: int8 for %s, which %s", weights, checkpoint.path, reason)
    return "int8"


def kernels_wanted(device: str) -> bool:
    """Whether the native CPU kernels run the models.

    ``PACELINE_KERNELS``: ``torch`` and ``triton`` run torch modules, ``native`` insists on them. Warns once if they are
    missing.

    Raises:
        ConfigError: it insists in vain or says something else, or ``PACELINE_ISA`` names what is not here.
    """
    try:
        wanted = dispatch.wanted()
    except dispatch.UnknownKernelsError as error:
        raise ConfigError(str(error)) from error
    if wanted == "triton":
        _check_triton(device)
    if device != "cpu" or wanted in ("torch", "triton"):
        return False
    missing = native_missing()
    if missing is None:
        _check_isa()
        return True
    if wanted == "native":
        raise ConfigError(f"PACELINE_KERNELS is native, but {missing}")
    _warn_missing(missing)
    return False


def _check_triton(device: str) -> None:
    missing = dispatch.triton_missing(device)
    if missing is not None:
        raise ConfigError(f"PACELINE_KERNELS is triton, but {missing}")


def _check_isa() -> None:
    try:
        best_isa()
    except IsaUnavailable as error:
        raise ConfigError(str(error)) from error


@cache
def _warn_missing(reason: str) -> None:
    _log.warning("running on torch instead of the CPU kernels: %s", reason)
