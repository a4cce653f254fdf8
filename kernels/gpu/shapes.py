"""Layer shapes of real models, [out, in], for tuning and benches; and random weights of such shapes."""

import torch

from paceline.kernels.formats import Pattern, SparseTiles, SparseWeight, pack_tiles

LAYERS: dict[str, tuple[int, int]] = {
    "smollm2 qkv": (960, 576),
    "smollm2 gate+up": (3072, 576),
    "smollm2 down": (576, 1536),
    "qwen-1.5b gate+up": (17920, 1536),
    "qwen-1.5b down": (1536, 8960),
    "llama-7b qkv": (12288, 4096),
    "llama-7b down": (4096, 11008),
    "llama-70b gate+up": (57344, 8192),
    "llama-70b down": (8192, 28672),
}
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_tiles(
    shape: tuple[int, int], pattern: Pattern, sparsity: float, value_dtype: str, device: torch.device
) -> SparseTiles:
    """Values at random places, the share of n:m being the pattern's own; packed on the device."""
    generator = torch.Generator(device).manual_seed(0)
    order = torch.rand(shape, generator=generator, device=device)
    if pattern.structured:
        groups = order.view(shape[0], -1, pattern.m)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept = kept.scatter_(-1, groups.topk(pattern.n, dim=-1).indices, True).view(shape)
    else:
        kept = order >= sparsity
    weight = torch.randn(shape, generator=generator, device=device)
    scale = None
    if value_dtype == "int8":
        weight = (weight * 40).round().clamp(-127, 127).to(torch.int8)
        scale = torch.full((shape[0],), 1 / 40, device=device)
    else:
        weight = weight.to(_FLOATS[value_dtype])
    return pack_tiles(SparseWeight.from_dense(weight * kept, kept, pattern=pattern, scale=scale))
