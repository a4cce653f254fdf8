"""Checks of artifacts in native form that need no target: manifest, configuration, restricted vocabulary, int8 rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.server.errors import ArtifactError, UnsupportedModelError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.manifest import MANIFEST, Manifest, read_manifest
from paceline.server.models.sparse_form import SPARSE_FORMATS

BASE_ARCHITECTURE = "base_architecture"
FORMATS = ("fp32", "bf16", "int8", *SPARSE_FORMATS)


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A quantized matrix as stored: int8 [out, in] in [-127, 127] and fp32 [out]."""

    values: Tensor
    scale: Tensor

    @classmethod
    def checked(cls, values: Tensor, scale: Tensor, where: str) -> "Int8Rows":
        """From a file.

        Raises:
            ArtifactError: types, shapes or values are not what they must be.
        """
        fits = values.dtype is torch.int8 and values.dim() == 2 and scale.dtype is torch.float32
        if not fits or scale.shape != values.shape[:1]:
            raise ArtifactError(
                f"{where} and its scales must be int8 [out, in] and fp32 [out], "
                f"but are {short(values)} and {short(scale)}"
            )
        if (values == -128).any():
            raise ArtifactError(f"{where} holds -128; int8 weights are in [-127, 127]")
        return cls(values, scale)

    def dequantize(self) -> Tensor:
        """fp32 [out, in]."""
        return self.values.float() * self.scale[:, None]


def native_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact in native form.

    Raises:
        ArtifactError: there is none, or it is broken.
        UnsupportedModelError: a weight format that is not loaded.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is in native form, but has no {MANIFEST}")
    if manifest.weights["format"] not in FORMATS:
        raise UnsupportedModelError(
            f"{folder} holds {manifest.weights['format']} weights; this version loads {', '.join(FORMATS)}"
        )
    return manifest


def base_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``config.json`` as a plain checkpoint would have it.

    Raises:
        ArtifactError: it does not name the architecture that the model is of.
    """
    base = config.get(BASE_ARCHITECTURE)
    expected = f"{config.get('model_type')}ForCausalLM"
    if not isinstance(base, str) or base.lower() != expected.lower():
        raise ArtifactError(
            f"{folder / 'config.json'}: {BASE_ARCHITECTURE} must name the architecture of model_type "
            f"{config.get('model_type')!r}, but is {base!r}"
        )
    plain = {key: value for key, value in config.items() if key != BASE_ARCHITECTURE}
    return plain | {"architectures": [base]}


def read_vocab(stored: Checkpoint, name: str | None, config: Mapping[str, Any]) -> Tensor | None:
    """The list of ids of a restricted vocabulary, int32 [k], ascending; None where the manifest names none.

    Raises:
        ArtifactError: it is missing, or no such list.
    """
    if name is None:
        return None
    if name not in stored.tensor_names():
        raise ArtifactError(f"{stored.path} has no tensor {name}, which {MANIFEST} names as draft_vocab")
    ids, size = stored.tensor(name), config.get("vocab_size")
    if not isinstance(size, int):
        raise ArtifactError(
            f"{stored.path / 'config.json'}: vocab_size must be a whole number, but is {size!r}"
        )
    if ids.dtype is not torch.int32 or ids.dim() != 1 or not len(ids):
        raise ArtifactError(f"{stored.path}: {name} must be int32 [k], but is {short(ids)}")
    if not (ids[1:] > ids[:-1]).all():
        raise ArtifactError(f"{stored.path}: {name} must hold ascending ids, each once")
    if int(ids[0]) < 0 or int(ids[-1]) >= size:
        raise ArtifactError(
            f"{stored.path}: {name} holds ids from {int(ids[0])} to {int(ids[-1])}, "
            f"but the vocabulary is 0 to {size - 1}"
        )
    return ids


def short(tensor: Tensor) -> str:
    """Type and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
