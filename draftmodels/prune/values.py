"""From pruned matrices to what an artifact stores: values in their type, and the matrix that they stand for."""

import torch
from torch import Tensor

from paceline.draftmodels.prune.goal import Pruned
from paceline.kernels.cpu.int8 import quantize_rows
from paceline.kernels.formats import Pattern, SparseWeight, ValueDtype
from paceline.server.errors import ArtifactError

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def stored(pruned: Pruned, pattern: Pattern, dtype: ValueDtype, name: str) -> SparseWeight:
    """The sparse weight of a pruned matrix, on the CPU.

    int8 rounds with one scale per output row, as the server does. Small floats that round to -0 become 0.

    Raises:
        ArtifactError: a weight that is not finite in that type.
    """
    weight, kept = pruned.weight.cpu(), pruned.kept.cpu()
    if dtype == "int8":
        values, scale = quantize_rows(weight)
        return SparseWeight.from_dense(values, kept, pattern=pattern, scale=scale)
    values = weight.to(_FLOATS[dtype]) + 0.0
    if not torch.isfinite(values).all():
        raise ArtifactError(f"{name}: pruned weights are too large for {dtype} values; take --values fp32")
    return SparseWeight.from_dense(values, kept, pattern=pattern)


def restored(weight: SparseWeight, device: torch.device) -> Tensor:
    """What a stored weight computes with, fp32 [out, in] without -0."""
    return weight.to_dense().to(device) + 0.0
