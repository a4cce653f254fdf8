"""What pruning one linear layer shall reach, and what it gives: the vocabulary of all methods.

How many weights go is exact: a share of a count is rounded once, and parts of a matrix (rows, blocks of columns) get
counts that add up to that of the whole.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.formats import Pattern


@dataclass(frozen=True, slots=True)
class Goal:
    """Where zeros may stand and how many there are.

    Attributes:
        sparsity: share of the weights to remove, 0 <= sparsity < 1; of an n:m pattern its own, 1 - n / m.
    """

    pattern: Pattern
    sparsity: float

    def removed_before(self, count: int) -> int:
        """How many of the first ``count`` weights of a matrix are removed."""
        return math.floor(count * self.sparsity + 0.5)

    def removed(self, start: int, stop: int) -> int:
        """How many of the weights [start, stop) are removed; neighbouring ranges add up."""
        return self.removed_before(stop) - self.removed_before(start)


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned matrix.

    Attributes:
        weight: [out, in], zero where nothing is kept; never -0.
        kept: bool [out, in]; zeros among the kept weights are possible.
    """

    weight: Tensor
    kept: Tensor

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor) -> "Pruned":
        """Put zeros where nothing is kept; -0 becomes 0, as a format that skips zeros cannot tell them apart."""
        return cls(weight.masked_fill(~kept, 0.0) + 0.0, kept)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` smallest scores of a whole matrix; of equal ones the later are taken.

    Args:
        scores: any shape.

    Returns:
        bool, shaped like ``scores``.
    """
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    chosen = flat < limit
    equal = (flat == limit).nonzero().squeeze(-1)
    chosen[equal[len(equal) - (count - int(chosen.sum())) :]] = True
    return chosen.view(scores.shape)


def lowest_per_row(scores: Tensor, counts: Tensor) -> Tensor:
    """As ``lowest``, ``counts[i]`` in row i.

    Args:
        scores: [rows, columns].
        counts: int64 [rows].

    Returns:
        bool [rows, columns].
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    last = places >= scores.shape[1] - counts[:, None]
    return torch.zeros_like(last).scatter_(1, order, last)


def kept_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """The n highest scores of every m neighbours; of equal ones the earlier are kept.

    Args:
        scores: [rows, columns], columns a multiple of m.

    Returns:
        bool [rows, columns].
    """
    groups = scores.reshape(-1, pattern.m)
    counts = torch.full((len(groups),), pattern.m - pattern.n, device=scores.device)
    return ~lowest_per_row(groups, counts).view(scores.shape)
