"""SparseGPT (arXiv:2301.00774): columns are pruned from left to right, and what that costs is made up for to the right.

With H = 2 X X^T + damping * mean(diag) * I and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), removing w_j adds
-w_j / U_jj * U_jk to each later weight w_k of the row, and costs w_j^2 / U_jj^2 / 2 of the row's squared output error:
U_jj^2 is the first diagonal element of the inverse of H without the columns that are done. Updates beyond the block of
columns at hand are added up and applied once, as one matrix product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.prune.goal import Goal, Pruned, kept_in_groups, lowest

#: Factor by which damping grows while H cannot be factorised, and what a damping of nothing grows to first.
_MORE, _LEAST = 10.0, 1e-4


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """What the inputs of a layer say about its weights; linears that read the same inputs share it.

    Attributes:
        upper: U, fp64 [in, in].
        dead: inputs that were always zero, bool [in]: their weights have no effect and become zero.
        damping: what was added to the diagonal, relative to its mean; more than asked for where that was too little.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(gram: Tensor, damping: float) -> InverseFactor:
    """Factorise the inverse Hessian.

    H is factorised backwards as R R^T with R upper triangular; then U = R^-1, and H^-1 itself is never made.

    Args:
        gram: X X^T over the calibration rows, fp64 [in, in], finite.
        damping: relative to the mean of the diagonal over inputs that are not dead.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = 2.0 * diagonal[~dead].mean() if not dead.all() else diagonal.new_tensor(1.0)
    while True:
        hessian = 2.0 * gram
        # A dead input is coupled to no other, so that any number above 0 will do.
        hessian.diagonal().add_(torch.where(dead, mean, damping * mean))
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed and torch.isfinite(lower).all():
            break
        damping = max(_MORE * damping, _LEAST)
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
    return InverseFactor(upper, dead, damping)


def sparsegpt(weight: Tensor, factor: InverseFactor, goal: Goal, *, block_size: int = 128) -> Pruned:
    """Prune a matrix and adapt the weights that are kept.

    Args:
        weight: fp32 or fp64 [out, in]; computed with in its type.
        block_size: columns whose mask is chosen at once (unstructured), and after which later columns are updated; a
            multiple of m for n:m, whose groups are chosen when the sweep comes to them.
    """
    left = weight.masked_fill(factor.dead, 0.0)
    upper = factor.upper.to(weight.dtype)
    kept = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        # Transposed, as columns are what is worked on.
        columns, own = left[:, start:stop].T.contiguous(), upper[start:stop, start:stop]
        chosen = _unstructured(columns, own, goal, start) if not goal.pattern.structured else None
        errors, keep = _sweep(columns, own, chosen, goal)
        left[:, start:stop], kept[:, start:stop] = columns.T, keep.T
        left[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return Pruned.of(left, kept)


def _unstructured(columns: Tensor, upper: Tensor, goal: Goal, start: int) -> Tensor:
    """Which weights of a block to keep, bool [columns, out]: those whose removal costs most."""
    out = columns.shape[1]
    count = goal.removed(start * out, (start + len(columns)) * out)
    return ~lowest(_costs(columns, upper), count)


def _sweep(columns: Tensor, upper: Tensor, kept: Tensor | None, goal: Goal) -> tuple[Tensor, Tensor]:
    """Remove weights column by column, within a block and in place.

    Args:
        columns: [columns, out].
        upper: the block's own square of U.
        kept: bool [columns, out]; None chooses groups of the goal's pattern as it goes.

    Returns:
        what later columns must make up for, w_j / U_jj of each removed weight, [columns, out]; and what was kept.
    """
    errors, m = torch.zeros_like(columns), goal.pattern.m
    choose, keep = kept is None, torch.ones_like(columns, dtype=torch.bool) if kept is None else kept
    for j in range(len(columns)):
        if choose and j % m == 0:
            costs = _costs(columns[j : j + m], upper[j : j + m, j : j + m])
            keep[j : j + m] = kept_in_groups(costs.T, goal.pattern).T
        errors[j] = (columns[j] / upper[j, j]).masked_fill(keep[j], 0.0)
        columns[j:].addr_(upper[j, j:], errors[j], alpha=-1.0)
    return errors, keep


def _costs(columns: Tensor, upper: Tensor) -> Tensor:
    """w_j^2 / U_jj^2, [columns, out]."""
    return (columns / upper.diagonal()[:, None]).square()
