"""Artifacts in Paceline's native form, read as Hugging Face checkpoints.

Such a folder may take tensors from its target, propose a part of the vocabulary only and hold int8 weights
(``X.weight`` int8 [out, in] with ``X.weight_scale`` fp32 [out]) or sparse ones (``sparse_form``); ``paceline.json``
says which. Owns where each tensor comes from and whether the folder is consistent. What is done with the tensors is
the loader's business.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.kernels.formats import SparseWeight
from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint, read_json
from paceline.server.models.config import (
    EMBEDDING,
    HEAD,
    NATIVE_ARCHITECTURE,
    ModelConfig,
    architectures,
    parse_model_config,
)
from paceline.server.models.manifest import MANIFEST, check_base_weights
from paceline.server.models.native_checks import Int8Rows, base_config, native_manifest, read_vocab, short
from paceline.server.models.sparse_form import (
    SCALE,
    SparseForm,
    part_names,
    sparse_names,
    take_quantization,
)
from paceline.server.models.student import is_student

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is found; ``rows``: which of its rows are meant, int64, None for all."""

    checkpoint: Checkpoint
    name: str
    rows: Tensor | None = None

    def read(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        return tensor if self.rows is None else tensor[self.rows]


def is_native_form(path: Path) -> bool:
    """Whether a folder is an artifact in native form."""
    config = path / "config.json"
    return config.is_file() and NATIVE_ARCHITECTURE in architectures(read_json(config), str(config))


def open_model(path: Path, target: Checkpoint | None = None) -> Checkpoint:
    """Open an artifact in native form, or whatever ``open_checkpoint`` opens.

    Args:
        path: what to open.
        target: the model that an artifact was made for; plain checkpoints need none.

    Raises:
        ArtifactError: missing or damaged files, or an artifact that does not fit itself or the target.
        UnsupportedModelError: a weight format that is not loaded.
    """
    return NativeCheckpoint(path, target) if is_native_form(path) else open_checkpoint(path)


def stored_int8(checkpoint: Checkpoint, name: str) -> Int8Rows | None:
    """A tensor as an artifact stores it, if that is int8."""
    return checkpoint.int8(name) if isinstance(checkpoint, NativeCheckpoint) else None


def stored_sparse(checkpoint: Checkpoint, name: str) -> SparseWeight | None:
    """A linear as an artifact stores it, if that is sparse."""
    return checkpoint.sparse(name) if isinstance(checkpoint, NativeCheckpoint) else None


def draft_vocab(checkpoint: Checkpoint) -> Tensor | None:
    """The ids that an artifact's head has rows for, ascending, int32 [k]; None for all."""
    return checkpoint.draft_vocab if isinstance(checkpoint, NativeCheckpoint) else None


class NativeCheckpoint:
    """An opened artifact; see ``checkpoint.Checkpoint``.

    Without a target it can be looked at and checked, but tensors that it shares cannot be read.

    Attributes:
        hf_config: of the architecture it is made of, as a plain checkpoint would have it.
        sparse_form: how its sparse linears are stored; None if it has none.
        draft_vocab: the ids that the head has rows for, ascending, int32 [k]; None for all.
    """

    def __init__(self, folder: Path, target: Checkpoint | None = None) -> None:
        self.path = folder
        self._stored, self._target = SafetensorsCheckpoint(folder), target
        self.manifest = native_manifest(folder)
        self.sparse_form = SparseForm.parse(self.manifest.weights, f"{folder / MANIFEST}: weights")
        where = str(folder / "config.json")
        config = take_quantization(self._stored.hf_config, self.sparse_form, where)
        self.hf_config: dict[str, Any] = base_config(config, folder)
        self._stored_names = frozenset(self._stored.tensor_names())
        self._sparse_names = sparse_names(self._stored_names)
        self.draft_vocab = read_vocab(self._stored, self.manifest.draft_vocab, self.hf_config)
        self._check_consistent()
        if target is not None and self.manifest.shared_with_target:
            self._check_target(target)

    @property
    def has_target(self) -> bool:
        """Whether shared tensors can be read."""
        return self._target is not None

    @property
    def in_int8(self) -> bool:
        """Whether its weights, or the values of its sparse ones, are stored in int8."""
        if self.sparse_form is not None:
            return self.sparse_form.in_int8
        return bool(self.manifest.weights["format"] == "int8")

    def tensor_names(self) -> list[str]:
        """See ``Checkpoint.tensor_names``: stored and shared ones, without scales and the list of ids; sparse linears
        by the names that they would have if they were dense."""
        scales = {name + SCALE for name in self._stored_names}
        names = self._stored_names - scales - part_names(self._sparse_names) - {self.manifest.draft_vocab}
        names |= self._sparse_names
        names |= set(self.manifest.shared_with_target)
        return sorted(names | {HEAD} if self.draft_vocab is not None else names)

    def tensor(self, name: str) -> Tensor:
        """See ``Checkpoint.tensor``; int8 comes dequantized, what is sparse with its zeros.

        Raises:
            ArtifactError: there is no such tensor, or it is not of the type and rows that it must be of.
        """
        sparse = self.sparse(name)
        if sparse is not None:
            return sparse.to_dense() if self.in_int8 else sparse.stored()
        rows = self.int8(name)
        if rows is not None:
            return rows.dequantize()
        place = self._place(name)
        tensor = place.read(place.name)
        if tensor.dtype not in _FLOATS:
            raise ArtifactError(f"{self.path}: {name} is {short(tensor)} and has no {name}{SCALE}")
        self._check_head_rows(name, tensor)
        return tensor

    def int8(self, name: str) -> Int8Rows | None:
        """A tensor that is stored in int8; None for all others.

        Raises:
            ArtifactError: values, scales or rows are not what they must be.
        """
        if name in self.manifest.shared_with_target:
            return None
        place = self._place(name)
        if place.checkpoint is not self._stored or place.name + SCALE not in self._stored_names:
            return None
        values, scale = place.read(place.name), place.read(place.name + SCALE)
        self._check_head_rows(name, values)
        return Int8Rows.checked(values, scale, f"{self.path}: {name}")

    def sparse(self, name: str) -> SparseWeight | None:
        """A linear that is stored sparse; None for all other tensors.

        Raises:
            ArtifactError: its parts contradict each other, or it is not of this model.
        """
        if self.sparse_form is None or name not in self._sparse_names:
            return None
        if name not in self._shapes.tensor_names():
            raise ArtifactError(f"{self.path}: tensor {name} is not of this model")
        return self.sparse_form.read(self._stored, name, self._shapes.tensor_shape(name)[1])

    def num_values(self, name: str) -> int | None:
        """How many values a sparse linear stores, by their shape alone; None for all other tensors."""
        if self.sparse_form is None or name not in self._sparse_names:
            return None
        return self.sparse_form.num_values(self._stored, name)

    def weights_sha256(self) -> str:
        """See ``Checkpoint.weights_sha256``; covers what is shared and the list's name where there are such."""
        own = self._stored.weights_sha256()
        if self.draft_vocab is None and not self.manifest.shared_with_target:
            return own
        target = self._target.weights_sha256() if self._target is not None else ""
        lines = [own, target, str(self.manifest.draft_vocab), *self.manifest.shared_with_target]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def _shapes(self) -> ModelConfig:
        """Parsed when a sparse linear is read: its number of inputs is stored nowhere else."""
        return parse_model_config(self.hf_config, where=str(self.path))

    def _place(self, name: str) -> _Place:
        if name == HEAD and self.draft_vocab is not None and self.hf_config.get("tie_word_embeddings"):
            inner = self._place(EMBEDDING)
            return _Place(inner.checkpoint, inner.name, self.draft_vocab.long())
        if name not in self.manifest.shared_with_target:
            return _Place(self._stored, name)
        if self._target is None:
            raise ArtifactError(
                f"{self.path} takes {name} from {self.manifest.base.id}: "
                f"use it as a draft (paceline serve {self.manifest.base.id} --draft {self.path})"
            )
        rows = self.draft_vocab.long() if name == HEAD and self.draft_vocab is not None else None
        return _Place(self._target, _name_in(self._target, name), rows)

    def _check_consistent(self) -> None:
        problem = next(self._problems(), None)
        if problem is not None:
            raise ArtifactError(f"{self.path}: {problem}")

    def _problems(self) -> Iterator[str]:
        """What contradicts what, as far as it shows without reading weights."""
        shared = self.manifest.shared_with_target
        for name in shared:
            if name in self._stored_names | self._sparse_names:
                yield f"{name} is stored, but {MANIFEST} lists it in shared_with_target"
        if self.hf_config.get("tie_word_embeddings") and (HEAD in shared or HEAD in self._stored_names):
            yield f"{HEAD} is there, but config.json says tie_word_embeddings; set that to false"
        yield from self._sparse_problems()
        matrices = self._stored_names | self._sparse_names
        scaled = any(name + SCALE in self._stored_names for name in matrices)
        if scaled != self.in_int8:
            found = "there are" if scaled else "there are no"
            said = self.sparse_form or f"weights.format {self.manifest.weights['format']}"
            yield f"{MANIFEST} says {said}, but {found} int8 weights"

    def _sparse_problems(self) -> Iterator[str]:
        if self.sparse_form is not None:
            yield from self.sparse_form.problems(self._stored_names)
        elif self._sparse_names:
            name = min(self._sparse_names)
            yield f"{MANIFEST} says weights.format {self.manifest.weights['format']}, but {name} is sparse"

    def _check_target(self, target: Checkpoint) -> None:
        if not _is_student_of(target, self.manifest.base.weights_sha256):
            sha256 = target.weights_sha256()
            check_base_weights(self.manifest.base, sha256, artifact=self.path, target=target.path)
        names, theirs = frozenset(target.tensor_names()), target.hf_config.get("hidden_size")
        for name in self.manifest.shared_with_target:
            if _name_in(target, name) not in names:
                raise ArtifactError(f"{self.path} shares {name} with its target, but {target.path} has none")
        if self.hf_config.get("hidden_size") != theirs:
            raise ArtifactError(
                f"{self.path} shares tensors with its target, but has hidden_size "
                f"{self.hf_config.get('hidden_size')} and the target {theirs}: it needs tensors of its own"
            )

    def _check_head_rows(self, name: str, tensor: Tensor) -> None:
        if name == HEAD and self.draft_vocab is not None and len(tensor) != len(self.draft_vocab):
            raise ArtifactError(
                f"{self.path}: {HEAD} has {len(tensor)} rows, "
                f"but {self.manifest.draft_vocab} lists {len(self.draft_vocab)} ids"
            )


def _is_student_of(target: Checkpoint, sha256: str) -> bool:
    """Whether a target is a student of the model with these weights: what its base's drafts share is in it too, and a
    draft never changes what its target says."""
    if not isinstance(target, NativeCheckpoint):
        return False
    return is_student(target.manifest) and target.manifest.base.weights_sha256 == sha256


def head_name(checkpoint: Checkpoint) -> str:
    """Where a checkpoint's head is: a tied one is stored once, as the embedding."""
    return EMBEDDING if checkpoint.hf_config.get("tie_word_embeddings") else HEAD


def _name_in(target: Checkpoint, name: str) -> str:
    return head_name(target) if name == HEAD else name
