"""Checkpoint tensors by Hugging Face name, as whoever builds a decoder wants them: dtype, device, checked shape.

Knows nothing of what the tensors become. Progress is counted in bytes of fp32, whatever the checkpoint stores.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels.formats import SparseWeight
from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig
from paceline.server.models.native_form import Int8Rows, stored_int8, stored_sparse
from paceline.server.models.progress import Update

_FP32_BYTES = 4


class CheckedTensors:
    """A ``Fetch``: call it with a name.

    Args:
        update: called with the bytes handed out so far; a tensor fetched twice counts twice.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        update: Update = lambda done: None,
    ) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._dtype, self._device = dtype, device or torch.device("cpu")
        self._names = frozenset(checkpoint.tensor_names())
        self._update, self._done_bytes = update, 0

    def __call__(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ArtifactError: it is missing or has another shape than the configuration says.
        """
        if name not in self._names:
            raise ArtifactError(f"{self._checkpoint.path}: tensor {name} is missing")
        tensor = self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)
        self._hand_out(name, tensor.shape)
        return tensor

    def int8(self, name: str) -> Int8Rows | None:
        """A tensor that the checkpoint stores in int8, as stored; None for all others.

        Raises:
            ArtifactError: it has another shape than the configuration says.
        """
        rows = stored_int8(self._checkpoint, name)
        if rows is not None:
            self._hand_out(name, rows.values.shape)
        return rows

    def sparse(self, name: str) -> SparseWeight | None:
        """A linear that the checkpoint stores sparse, float values in the dtype asked for; None for all others.

        Raises:
            ArtifactError: it has another shape than the configuration says.
        """
        weight = stored_sparse(self._checkpoint, name)
        if weight is None:
            return None
        self._hand_out(name, (weight.out_features, weight.in_features))
        return weight.to(dtype=self._dtype, device=self._device)

    def _hand_out(self, name: str, shape: Sequence[int]) -> None:
        expected = self._config.tensor_shape(name)
        if tuple(shape) != expected:
            raise ArtifactError(
                f"{self._checkpoint.path}: tensor {name} is {tuple(shape)}, "
                f"but the configuration says {expected}"
            )
        self._done_bytes += math.prod(shape) * _FP32_BYTES
        self._update(self._done_bytes)


def total_bytes(config: ModelConfig) -> int:
    """fp32 bytes of the decoder's matrices; norms and biases do not show on a progress bar."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    block = sum(math.prod(config.tensor_shape(f"{part}.weight")) for part in parts)
    rows = config.vocab_size + (0 if config.tied_head else config.head_rows)
    rows += 2 * config.hidden_size if config.reads_state else 0
    return (config.num_layers * block + rows * config.hidden_size) * _FP32_BYTES
