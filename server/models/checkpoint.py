"""A model on disk, opened: its Hugging Face configuration and its tensors under Hugging Face names.

Owns reading of safetensors folders (one file or shards); GGUF files are ``gguf.GgufCheckpoint``. Tensors are
read one by one, on CPU, so that a loader never holds a model twice. Nothing is ever unpickled. Which
architectures run is the business of ``config``.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from paceline.server.errors import ArtifactError
from paceline.server.models.verified import file_sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint(Protocol):
    """An opened model.

    Attributes:
        path: the folder or file it was opened from.
        hf_config: content of ``config.json``, or what a GGUF file's metadata amounts to.
    """

    @property
    def path(self) -> Path:
        """The folder or file it was opened from."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """Keys and values of a Hugging Face ``config.json``."""
        ...

    def tensor_names(self) -> list[str]:
        """Hugging Face names, such as ``model.layers.0.self_attn.q_proj.weight``."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on CPU, in its stored float type; quantized GGUF types come as float32.

        Raises:
            ArtifactError: there is no such tensor.
        """
        ...

    def weights_sha256(self) -> str:
        """Hex hash of the weight files; a file verified before is not read again."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder (safetensors) or a ``.gguf`` file; ``native_form.open_model`` opens artifacts too.

    Raises:
        ArtifactError: missing, truncated, damaged or pickled files.
        UnsupportedModelError: a GGUF architecture or tensor layout that has no Hugging Face counterpart here.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if not path.exists():
        raise ArtifactError(f"there is no model at {path}")
    if path.suffix == ".gguf":
        from paceline.server.models.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.suffix in PICKLED_SUFFIXES:
        raise _pickled(path)
    raise ArtifactError(f"{path} is neither a .gguf file nor a folder with config.json and {WEIGHTS}")


class SafetensorsCheckpoint:
    """A Hugging Face folder: ``config.json`` and ``model.safetensors`` or its shards."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.hf_config = read_json(folder / "config.json")
        self._file_of = _tensor_files(folder)
        self._open: dict[Path, Any] = {}

    def tensor_names(self) -> list[str]:
        """See ``Checkpoint.tensor_names``."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.tensor``."""
        from safetensors import SafetensorError

        if name not in self._file_of:
            raise ArtifactError(f"{self.path} has no tensor {name}")
        file = self._file_of[name]
        try:
            tensor: torch.Tensor = self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise ArtifactError(f"{file} has no readable tensor {name}: {error}") from error
        # It is a view of the file, where a header of odd length puts it at an address that kernels must not read at.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def weights_sha256(self) -> str:
        """See ``Checkpoint.weights_sha256``; of shards, the hash of the lines ``NAME HASH`` in name order."""
        files = sorted(set(self._file_of.values()))
        hashes = [file_sha256(file) for file in files]
        if len(files) == 1:
            return hashes[0]
        lines = "".join(f"{file.name} {value}\n" for file, value in zip(files, hashes, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = _open_safetensors(file)
        return self._open[file]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path.parent} has no {path.name}, so it is not a Hugging Face folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object")
    return value


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ArtifactError(f"{file.parent} lacks {file.name}; fetch the model again") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} is damaged or cut short: {error}; fetch the model again") from error


def _tensor_files(folder: Path) -> Mapping[str, Path]:
    """Which file holds each tensor; every file must be there and hold what the index says."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactError(f"{folder / INDEX} has no weight_map")
        # A name with a slash in it could point outside the folder.
        files = {name: folder / Path(str(shard)).name for name, shard in weight_map.items()}
        held = {file: set(_open_safetensors(file).keys()) for file in set(files.values())}
        for name, file in files.items():
            if name not in held[file]:
                raise ArtifactError(
                    f"{file} lacks {name}, which {INDEX} says it holds; fetch the model again"
                )
        return files
    if (folder / WEIGHTS).exists():
        return dict.fromkeys(_open_safetensors(folder / WEIGHTS).keys(), folder / WEIGHTS)
    for suffix in PICKLED_SUFFIXES:
        for pickled in folder.glob(f"*{suffix}"):
            raise _pickled(pickled)
    raise ArtifactError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _pickled(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} holds pickled weights, which could run code when opened; save the model with safetensors "
        "instead (transformers: model.save_pretrained(DIR))"
    )
