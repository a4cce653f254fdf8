"""What tests of the Triton kernels share: random sparse weights, and Triton as the chosen set of kernels."""

import torch

from paceline.kernels.formats import Pattern, SparseWeight
from paceline.kernels.formats.sparse import ValueDtype

PATTERNS = ["unstructured", "2:4", "16:32", "16:64"]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_sparse(
    out: int,
    width: int,
    *,
    pattern: str = "unstructured",
    dtype: ValueDtype = "fp32",
    sparsity: float = 0.5,
    seed: int = 0,
) -> SparseWeight:
    """Gaussian values at random places; int8 uses all of its range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    kind = Pattern.parse(pattern)
    order = torch.rand(out, width, generator=generator)
    if kind.structured:
        kept = order.view(out, -1, kind.m).argsort(-1).argsort(-1).lt(kind.n).view(out, width)
    else:
        kept = order >= sparsity
    scale = None
    if dtype == "int8":
        weight = (weight * 60).round().clamp(-127, 127).to(torch.int8)
        scale = torch.rand(out, generator=generator) + 0.1
    else:
        weight = weight.to(FLOATS[dtype])
    return SparseWeight.from_dense(weight * kept, kept, pattern=kind, scale=scale)
