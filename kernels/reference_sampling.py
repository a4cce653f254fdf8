"""Slow exact torch versions of the kernels that choose tokens: block by block, as the papers have it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels.noise import streams


def combine(
    members: Sequence[Tensor], weights: Tensor, temperatures: Tensor, keys: Tensor, is_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``ops.combine``."""
    logits = torch.zeros_like(members[0])
    for column, own in enumerate(members):
        weight = weights[:, column, None]
        logits = logits + torch.where(weight == 0, 0.0, weight * own)
    scores = logits.clone()
    for row in is_sampled.nonzero().flatten().tolist():
        if temperatures[row] != 1:
            scores[row] = (scores[row] - scores[row].max()) / temperatures[row]
        scores[row] += streams(keys[row : row + 1], logits.shape[1])[0]
    return scores.argmax(-1), logits


def verify(
    scores: Tensor,
    first_rows: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    q: Tensor,
    uniforms: Tensor,
    *,
    by_block: bool,
) -> tuple[Tensor, Tensor]:
    """See ``ops.verify``."""
    results = []
    for block, (first, length) in enumerate(zip(first_rows.tolist(), lengths.tolist(), strict=True)):
        p = scores[first : first + length + 1].softmax(-1)
        rule = _accept_block if by_block else _accept_token
        own = q[block, :length], drafts[block, :length].tolist(), uniforms[block].tolist()
        accepted, scale = rule(p, *own)
        weights = p[accepted] * scale if accepted < length else p[accepted]
        if accepted < length:
            weights = (weights - q[block, accepted]).clamp(min=0)
        # Where p <= q everywhere, p equals q: only rounding can reject there, and p is the limit of the residual.
        weights = p[accepted] if weights.sum() == 0 else weights
        running = weights.double().cumsum(0)
        goal = uniforms[block, length].double() * running[-1]
        results.append((accepted, int(torch.searchsorted(running, goal, right=True))))
    return tuple(torch.tensor(column, device=scores.device) for column in zip(*results, strict=True))  # type: ignore[return-value]


def _accept_token(p: Tensor, q: Tensor, drafts: list[int], uniforms: list[float]) -> tuple[int, float]:
    """2211.17192, algorithm 1: accepted tokens, and 1."""
    accepted = 0
    while accepted < len(drafts):
        if uniforms[accepted] >= _ratio(p, q, accepted, drafts[accepted]):
            break
        accepted += 1
    return accepted, 1.0


def _accept_block(p: Tensor, q: Tensor, drafts: list[int], uniforms: list[float]) -> tuple[int, float]:
    """2403.10444, algorithm 2: accepted tokens, and P at the last of them."""
    accepted, scale, joint = 0, 1.0, 1.0
    for i, token in enumerate(drafts):
        joint = min(joint * _ratio(p, q, i, token), 1.0)
        keep = joint
        if i + 1 < len(drafts):
            surplus = float((p[i + 1] * joint - q[i + 1]).clamp(min=0).sum(dtype=torch.float64))
            missing = surplus + 1 - joint
            keep = surplus / missing if missing > 0 else 1.0
        if uniforms[i] < keep:
            accepted, scale = i + 1, joint
    return accepted, scale


def _ratio(p: Tensor, q: Tensor, position: int, token: int) -> float:
    """p_i(y_i) / q_i(y_i), 0 where q is 0: such a token cannot have been drawn."""
    drawn = float(q[position, token])
    return float(p[position, token]) / drawn if drawn > 0 else 0.0
