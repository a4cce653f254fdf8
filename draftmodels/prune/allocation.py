"""How much of each block goes: the same of all, or less of those with more outliers (OWL, arXiv:2310.05175).

A block's outlier ratio D is the share of its weights whose Wanda score is over M times the block's mean (M is 5
or 10 in the paper, lambda 0.08 at 70%). OWL keeps more
where D is larger, within lambda of the wanted sparsity. The paper sets S_i proportional to 1 - D_i within [S - lambda,
S + lambda] and shifts the result to the wanted mean, which may leave those bounds; here the deviations from the mean
ratio are scaled instead, S_i = S - lambda (D_i - mean D) / max |D - mean D|: mean and bounds both hold exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(sparsity: float, blocks: int) -> list[float]:
    """The same sparsity for every block."""
    return [sparsity] * blocks


def owl(ratios: Sequence[float], sparsity: float, bound: float) -> list[float]:
    """Sparsity of each block from its outlier ratio; blocks are of equal size.

    Args:
        ratios: of all blocks, each 0 to 1.
        sparsity: the wanted mean.
        bound: lambda, the furthest that a block may be from it; at most ``min(sparsity, 1 - sparsity)``.
    """
    found = torch.tensor(ratios, dtype=torch.float64)
    deviation = found - found.mean()
    widest = deviation.abs().max()
    if widest == 0:
        return uniform(sparsity, len(ratios))
    return [sparsity - bound * float(own) for own in deviation / widest]


def outlier_ratio(scores: Sequence[Tensor], factor: float) -> float:
    """Share of a block's weights whose score is over ``factor`` times the block's mean score.

    Args:
        scores: of each of its linears, see ``wanda.wanda_scores``.
    """
    total = sum(part.numel() for part in scores)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / total
    return sum(int((part > factor * mean).sum()) for part in scores) / total
