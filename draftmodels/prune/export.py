"""From pruned weights to a student's folder: what is not pruned comes from the target as it is stored there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.artifact import int8_linears, write_student
from paceline.draftmodels.provenance import provenance
from paceline.draftmodels.prune.config import Recipe
from paceline.kernels.formats import SparseWeight
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import HEAD, parse_model_config
from paceline.server.models.manifest import Base, Manifest


def write_pruned(
    folder: Path,
    *,
    target: str,
    path: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    sparse: Mapping[str, SparseWeight],
    measured: Mapping[str, Any],
    tokenizer_sha256: str,
    force: bool,
) -> int:
    """Write the artifact and return the bytes of its weights.

    Args:
        target, path, checkpoint: what was pruned: its reference, where it lies, opened.
        sparse: every linear of the blocks.
        measured: one entry of the manifest's ``measured``.

    Raises:
        ArtifactError: it cannot be written.
    """
    base = Base(
        id=target,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=int(checkpoint.hf_config["vocab_size"]),
        weights_sha256=checkpoint.weights_sha256(),
    )
    manifest = Manifest(
        kind="student",
        base=base,
        weights={},  # as the sparse weights are
        recipe={"sparsify": recipe.as_dict()},
        provenance=provenance(seed=recipe.seed),
        measured=(measured,),
    )
    write_student(
        folder,
        config=checkpoint.hf_config,
        tensors=dense_tensors(checkpoint, recipe, set(sparse)),
        sparse=sparse,
        manifest=manifest,
        tokenizer_from=path,
        force=force,
    )
    return (folder / "model.safetensors").stat().st_size


def dense_tensors(checkpoint: Checkpoint, recipe: Recipe, pruned: set[str]) -> dict[str, Tensor]:
    """Embedding, norms, biases and an untied head.

    With fp32 values they are what the target stores; with others, fp32 matrices become bf16. Beside int8 values an
    untied head is int8, too; a tied one stays what the embedding is.
    """
    config = parse_model_config(checkpoint.hf_config)
    tensors = {name: checkpoint.tensor(name) for name in config.tensor_names() if name not in pruned}
    if recipe.values == "fp32":
        return tensors
    head = int8_linears({HEAD: tensors.pop(HEAD)}) if recipe.values == "int8" and HEAD in tensors else {}
    return {name: _narrow(tensor) for name, tensor in tensors.items()} | head


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.dim() == 2 and tensor.dtype is torch.float32 else tensor
