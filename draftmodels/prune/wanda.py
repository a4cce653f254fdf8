"""Wanda (arXiv:2306.11695): weights are compared by |w| times the norm of their input, within each output row."""

import torch
from torch import Tensor

from paceline.draftmodels.prune.goal import Goal, Pruned, kept_in_groups, lowest_per_row


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, equation 1.

    Args:
        weight: [out, in].
        squares: sum of squares of each input over the calibration rows, [in].

    Returns:
        [out, in] in the type of ``weight``.
    """
    return weight.abs() * squares.sqrt().to(weight.dtype)


def wanda(weight: Tensor, squares: Tensor, goal: Goal) -> Pruned:
    """Remove the lowest scores of each output row, or of each group of an n:m pattern; the others stay as they are.

    Args:
        weight: fp32 or fp64 [out, in].
        squares: sum of squares of each input, [in].
    """
    scores = wanda_scores(weight, squares)
    if goal.pattern.structured:
        return Pruned.of(weight, kept_in_groups(scores, goal.pattern))
    out, width = weight.shape
    counts = [goal.removed(row * width, (row + 1) * width) for row in range(out)]
    return Pruned.of(weight, ~lowest_per_row(scores, torch.tensor(counts, device=weight.device)))
