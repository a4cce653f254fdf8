"""Token sequences on disk: numbered files that are there whole or not at all.

A shard is a safetensors file: ``tokens`` int32 [total], ``offsets`` int64 [sequences + 1] (where each sequence starts
in ``tokens``, and the end), ``prompt_tokens`` int32 [sequences]; its metadata carries a hash of all three.
"""

import os
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.server.errors import DataError

_FORMAT = "paceline token shard 1"
_NAMES = ("tokens", "offsets", "prompt_tokens")
_PART = ".part-"


class ShardWriter:
    """Writes shards into a folder, which is made if missing; what an interrupted writer left half-done is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part in folder.glob(f"{_PART}*"):
                part.unlink()
        except OSError as error:
            raise DataError(f"cannot write token shards to {folder}: {error.strerror}") from error

    def write(self, index: int, sequences: Sequence[TokenSequence]) -> None:
        """Write shard ``index``, replacing the one that may be there.

        Raises:
            DataError: it cannot be written; nothing has changed then.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save

        tensors = _packed(sequences)
        try:
            data = save(tensors, metadata={"format": _FORMAT, "hash": _hash(tensors)})
            descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=_PART)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).chmod(0o644)
                Path(name).replace(_path(self._folder, index))
            finally:
                Path(name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write {_path(self._folder, index)}: {error}") from error


class TokenShards:
    """The shards of a folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, index: int) -> bool:
        return _path(self._folder, index).exists()

    @property
    def indices(self) -> list[int]:
        """Numbers of the shards that are there, ascending."""
        numbers = (path.stem.removeprefix("shard-") for path in self._folder.glob("shard-*.safetensors"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def read(self, index: int) -> list[TokenSequence]:
        """The sequences of a shard, as they were written.

        Raises:
            DataError: there is no such shard, or it is damaged.
        """
        path = _path(self._folder, index)
        if not path.exists():
            raise DataError(f"there is no token shard {path}")
        tensors = _checked(path)
        tokens, offsets, prompts = (tensors[name].tolist() for name in _NAMES)
        return [
            TokenSequence(tuple(tokens[start:end]), count)
            for start, end, count in zip(offsets[:-1], offsets[1:], prompts, strict=True)
        ]


def _path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def _packed(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    lengths = torch.tensor([0, *(len(s.tokens) for s in sequences)], dtype=torch.int64)
    return {
        "tokens": torch.tensor([token for s in sequences for token in s.tokens], dtype=torch.int32),
        "offsets": lengths.cumsum(0),
        "prompt_tokens": torch.tensor([s.prompt_tokens for s in sequences], dtype=torch.int32),
    }


def _checked(path: Path) -> dict[str, Tensor]:
    """A shard's tensors, if they are those that were written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _NAMES}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if about.get("format") != _FORMAT:
        raise DataError(f"{path} is not a token shard that this version reads")
    if about.get("hash") != _hash(tensors):
        raise _damaged(path, "its content has changed since it was written")
    return tensors


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"token shard {path} is damaged ({reason}); delete it and it will be made again")


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name in _NAMES:
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
