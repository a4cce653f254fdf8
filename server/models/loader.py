"""Checkpoint -> decoder on a device. Equal checkpoints in equal dtype are loaded once and shared.

Owns nothing of requests or KV. Progress goes to whoever passes ``on_progress``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import Checkpoint, open_checkpoint
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.llama import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Called with (tensors done, tensors in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with what identifies it.

    Attributes:
        key: equal for equal weights in equal dtype; what may share cached KV.
    """

    key: str
    path: Path
    config: ModelConfig
    dtype: torch.dtype
    decoder: Decoder


class ModelLoader:
    """Loads decoders and remembers them, so that a checkpoint named twice is in memory once."""

    def __init__(self, device: torch.device, *, on_progress: Progress | None = None) -> None:
        self._device = device
        self._on_progress = on_progress or (lambda done, total: None)
        self._loaded: dict[tuple[Path, str], LoadedModel] = {}

    def load(self, path: Path, weights: str) -> LoadedModel:
        """Load a Hugging Face folder or a GGUF file.

        Args:
            weights: ``fp32`` or ``bf16``.

        Raises:
            UnsupportedModelError: an architecture that the native engine does not run.
            ArtifactError: missing or misshapen tensors.
        """
        key = (path.resolve(), weights)
        if key not in self._loaded:
            self._loaded[key] = self._read(path, weights)
        return self._loaded[key]

    def _read(self, path: Path, weights: str) -> LoadedModel:
        checkpoint = open_checkpoint(path)
        config = parse_model_config(checkpoint.hf_config, where=str(path))
        dtype = DTYPES[weights]
        fetch = _Fetcher(checkpoint, dtype, self._device, self._on_progress)
        decoder = Decoder(config, fetch).eval()
        if decoder.embedding.shape != (config.vocab_size, config.hidden_size):
            raise ArtifactError(
                f"{path}: embedding is {tuple(decoder.embedding.shape)}, but config.json says "
                f"{(config.vocab_size, config.hidden_size)}"
            )
        return LoadedModel(f"{checkpoint.weights_sha256()}/{weights}", path, config, dtype, decoder)


class _Fetcher:
    """Hands checkpoint tensors to the decoder in the right dtype, on the right device."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress
    ) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._names = frozenset(checkpoint.tensor_names())
        self._progress, self._done = progress, 0

    def __call__(self, name: str) -> Tensor:
        if name not in self._names:
            raise ArtifactError(f"{self._checkpoint.path}: tensor {name} is missing")
        tensor = self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)
        self._done += 1
        self._progress(self._done, len(self._names))
        return tensor
