"""Magnitude pruning, the baseline: the smallest weights of each linear layer go, whatever their inputs are."""

from torch import Tensor

from paceline.draftmodels.prune.goal import Goal, Pruned, kept_in_groups, lowest


def magnitude(weight: Tensor, goal: Goal) -> Pruned:
    """Remove the smallest |w| of the whole matrix, or of each group of an n:m pattern.

    Args:
        weight: fp32 or fp64 [out, in].
    """
    scores = weight.abs()
    if goal.pattern.structured:
        return Pruned.of(weight, kept_in_groups(scores, goal.pattern))
    return Pruned.of(weight, ~lowest(scores, goal.removed_before(weight.numel())))
