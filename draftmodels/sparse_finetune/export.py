"""From a student in training to the artifact that the engine loads: mask as it was, values int8 or fp32.

The same path for the student that is kept during training and for the one that is shipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.artifact import write_student
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.kernels.cpu.int8 import quantize_rows
from paceline.kernels.formats import Pattern, SparseWeight
from paceline.server.models.config import EMBEDDING, HEAD
from paceline.server.models.manifest import Manifest


@dataclass(frozen=True)
class StudentAbout:
    """What an artifact says about itself beside its weights.

    Attributes:
        parent: the artifact that training started from; tokenizer, base and kind are its.
        int8: whether values are int8 with a scale per output row; else fp32.
        untrained: frozen tensors as they were read, by name; with fp32 values they are stored in that type.
    """

    parent: Path
    hf_config: Mapping[str, Any]
    manifest: Manifest
    pattern: Pattern
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    int8: bool
    untrained: Mapping[str, Tensor]


def export_student(
    folder: Path,
    student: Decoder,
    kept: Mapping[str, Tensor],
    about: StudentAbout,
    measured: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the student as it is now; a folder that is there is replaced as a whole.

    Args:
        kept: bool [out, in] of each sparse linear.

    Raises:
        ArtifactError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    sparse = {
        name: sparse_weight(tensors.pop(name), mask.cpu(), about.pattern, int8=about.int8)
        for name, mask in kept.items()
    }
    # A student with fp32 values has an fp32 embedding; beside int8 values that would be half of the file.
    untrained = {name: _stored(name, t) if about.int8 else t for name, t in about.untrained.items()}
    dense = {name: _stored(name, tensor) for name, tensor in tensors.items()} | untrained
    start = about.manifest
    manifest = Manifest(
        kind=start.kind,
        base=start.base,
        weights={},  # the writer's: what ``sparse`` is
        recipe={**about.recipe, "start": {"recipe": start.recipe, "provenance": start.provenance}},
        provenance=about.provenance,
        measured=tuple(measured),
        extra=start.extra,
    )
    write_student(
        folder,
        config=about.hf_config,
        tensors=dense,
        sparse=sparse,
        manifest=manifest,
        tokenizer_from=about.parent,
        force=True,
    )


def sparse_weight(weight: Tensor, kept: Tensor, pattern: Pattern, *, int8: bool) -> SparseWeight:
    """A masked weight, fp32 [out, in], in the canonical layout."""
    if not int8:
        return SparseWeight.from_dense(weight, kept, pattern=pattern)
    values, scale = quantize_rows(weight)
    return SparseWeight.from_dense(values, kept, pattern=pattern, scale=scale)


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Embedding and head in bf16, as checkpoints hold them; norms and biases in fp32."""
    return tensor.to(torch.bfloat16) if name in (EMBEDDING, HEAD) else tensor
