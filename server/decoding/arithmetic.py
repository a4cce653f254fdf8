"""Arithmetic of logits: the tensors of a ``mixture``.

Everything is fp32, and a row's result never depends on the rows beside it. Knows no sequences, no runners, no prompts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.server.decoding.mixture import Mixture
from paceline.server.decoding.sampler import keep_top_p_


def combine(members: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_i w_i s_i.

    Args:
        members: finite logits, fp32 [R, V] each; those of weight 0 may be anything finite.
        weights: fp32 [R, members].

    Returns:
        fp32 [R, V].
    """
    # Products and sums apart: a fused multiply-add would round rows differently by their place in the batch.
    total = members[0] * weights[:, :1]
    for index, logits in enumerate(members[1:], start=1):
        total += logits * weights[:, index, None]
    return total


def restrict_(combined: Tensor, members: Sequence[Tensor], mixtures: Sequence[Mixture]) -> None:
    """Remove from ``combined`` what the rows' nuclei leave out, in place.

    Args:
        combined: fp32 [R, V].
        members: fp32 [R, V] each.
        mixtures: R.
    """
    for member, top_p in sorted({nucleus for m in mixtures for nucleus in m.nuclei}, key=_order):
        rows = [i for i, m in enumerate(mixtures) if (member, top_p) in m.nuclei]
        kept = (combined if member is None else members[member])[rows]
        keep_top_p_(kept, [top_p] * len(rows))
        combined[rows] = combined[rows].masked_fill(kept == -math.inf, -math.inf)


def weight_rows(mixtures: Sequence[Mixture], device: torch.device) -> Tensor:
    """The weights of rows, fp32 [R, members]."""
    return torch.tensor([m.weights for m in mixtures], dtype=torch.float32, device=device)


def _order(nucleus: tuple[int | None, float]) -> tuple[float, float]:
    """Experts' nuclei first: the combination's is that of what they leave."""
    member, top_p = nucleus
    return math.inf if member is None else float(member), top_p
