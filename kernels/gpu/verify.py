"""Verification of draft blocks: how many tokens are accepted, and which token comes after them.

Token-wise (Leviathan et al. 2211.17192) and block verification (Sun et al. 2403.10444) with given uniforms. The
vocabulary is cut into chunks, a program each; every sum over it is made of the chunks' sums in rising order, so that no
atomics are needed and results repeat bit for bit. Sums and ratios are float64, probabilities fp32, as in the reference.

Launches, each reading what the one before wrote: ``row_stats_kernel`` (softmax), ``joint_kernel`` (ratios and their
running products), ``surplus_kernel`` (S_i, block rule only), ``accept_kernel``, ``residual_kernel`` and ``draw_kernel``
(the recovered or bonus token by inversion). B blocks, K draft tokens at most, V = vocabulary, C chunks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.kernels.gpu.runtime import launch

BLOCK = 1024


@triton.jit
def row_stats_kernel(scores, first_rows, lengths, maxima, sums, width, chunks, depth, BLOCK: tl.constexpr):
    """Each chunk's maximum and sum of exp(score - maximum), fp32 and float64 [B, K + 1, C]."""
    block, position, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if position <= tl.load(lengths + block):
        row = tl.load(first_rows + block) + position
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(scores + row * width + ids, mask=ids < width, other=float("-inf"))
        largest = tl.max(own, 0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        at = (block * (depth + 1) + position) * chunks + chunk
        tl.store(maxima + at, largest)
        tl.store(sums + at, tl.sum(tl.exp(own - shift).to(tl.float64), 0))


@triton.jit
def target_probs(scores, row, ids, inside, width, maximum, total):
    """p of some token ids, fp32, from the row's maximum and sum of exponentials."""
    own = tl.load(scores + row * width + ids, mask=inside, other=float("-inf"))
    return tl.div_rn(tl.exp(own - maximum), tl.zeros_like(own) + total)


@triton.jit
def joint_kernel(
    scores,
    first_rows,
    lengths,
    drafts,
    q,
    maxima,
    sums,
    row_maxima,
    row_sums,
    ratios,
    joint,
    width,
    chunks,
    depth,
    CHUNKS: tl.constexpr,
):
    """p_i(y_i) / q_i(y_i) and P_i = min(P_{i-1} p_i / q_i, 1), float64 [B, K]; the softmax terms, fp32 [B, K + 1]."""
    block = tl.program_id(0).to(tl.int64)
    length, first = tl.load(lengths + block), tl.load(first_rows + block)
    every = tl.arange(0, CHUNKS)
    here = every < chunks
    previous = tl.zeros([1], tl.float64) + 1.0
    one = tl.arange(0, 1)
    for position in range(length + 1):
        at = block * (depth + 1) + position
        largest = tl.load(maxima + at * chunks + every, mask=here, other=float("-inf"))
        maximum = tl.max(largest, 0)
        parts = tl.load(sums + at * chunks + every, mask=here, other=0.0)
        total = tl.sum(parts * tl.exp((largest - maximum).to(tl.float64)), 0).to(tl.float32)
        tl.store(row_maxima + at, maximum)
        tl.store(row_sums + at, total)
        if position < length:
            token = tl.load(drafts + block * depth + position) + one
            p = target_probs(scores, first + position, token, token < width, width, maximum, total)
            drawn = tl.load(q + (block * depth + position) * width + token)
            # A token with q = 0 cannot have been drawn: it is refused.
            divisor = tl.where(drawn > 0, drawn, 1.0).to(tl.float64)
            ratio = tl.where(drawn > 0, p.to(tl.float64) / divisor, 0.0)
            previous = tl.minimum(previous * ratio, 1.0)
            tl.store(ratios + block * depth + position + one, ratio)
            tl.store(joint + block * depth + position + one, previous)


@triton.jit
def surplus_kernel(
    scores,
    first_rows,
    lengths,
    q,
    row_maxima,
    row_sums,
    joint,
    surplus,
    width,
    chunks,
    depth,
    BLOCK: tl.constexpr,
):
    """Chunks of S_i = sum_v max(P_i p_{i+1}(v) - q_{i+1}(v), 0), float64 [B, K, C]; i = 1..length - 1."""
    block, position, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if position + 1 < tl.load(lengths + block):
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = ids < width
        at = block * (depth + 1) + position + 1
        maximum, total = tl.load(row_maxima + at), tl.load(row_sums + at)
        row = tl.load(first_rows + block) + position + 1
        p = target_probs(scores, row, ids, inside, width, maximum, total)
        drawn = tl.load(q + (block * depth + position + 1) * width + ids, mask=inside, other=0.0)
        kept = tl.load(joint + block * depth + position).to(tl.float32)
        excess = tl.maximum(p * kept - drawn, 0.0)
        tl.store(surplus + (block * depth + position) * chunks + chunk, tl.sum(excess.to(tl.float64), 0))


@triton.jit
def accept_kernel(
    lengths,
    uniforms,
    ratios,
    joint,
    surplus,
    accepted,
    scales,
    chunks,
    depth,
    BY_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Accepted tokens, int64 [B], and what multiplies p in the residual, fp32 [B]."""
    block = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + block)
    every = tl.arange(0, CHUNKS)
    count = length * 0
    scale = tl.full([], 1.0, tl.float64)
    going = length >= 0
    for position in range(length):
        drawn = tl.load(uniforms + block * (depth + 1) + position)
        at = block * depth + position
        if BY_BLOCK:
            # The longest prefix that is kept: h_i = S_i / (S_i + 1 - P_i), P_i at the last token.
            kept = tl.load(joint + at)
            inner_chunks = tl.where(position + 1 < length, chunks, 0)
            parts = tl.load(surplus + at * chunks + every, mask=every < inner_chunks, other=0.0)
            excess = tl.sum(parts, 0)
            rest = excess + 1.0 - kept
            inner = tl.where(rest > 0, excess / tl.where(rest > 0, rest, 1.0), 1.0)
            taken = drawn < tl.where(position + 1 == length, kept, inner)
            count = tl.where(taken, position + 1, count)
            scale = tl.where(taken, kept, scale)
        else:
            going = going & (drawn < tl.load(ratios + at))
            count += tl.where(going, 1, 0)
    tl.store(accepted + block, count)
    tl.store(scales + block, scale.to(tl.float32))


@triton.jit
def following_weights(
    scores, first, block, position, q, row_maxima, row_sums, scale, ids, width, length, depth
):
    """p and max(scale p - q, 0) after ``position`` accepted tokens, for some ids; the bonus token's residual is p."""
    inside = ids < width
    at = block * (depth + 1) + position
    maximum, total = tl.load(row_maxima + at), tl.load(row_sums + at)
    p = target_probs(scores, first + position, ids, inside, width, maximum, total)
    is_recovered = position < length
    drawn_width = tl.where(is_recovered, width, 0)
    drawn = tl.load(q + (block * depth + position) * width + ids, mask=ids < drawn_width, other=0.0)
    return p, tl.maximum(p * tl.where(is_recovered, scale, 1.0) - drawn, 0.0)


@triton.jit
def residual_kernel(
    scores,
    first_rows,
    lengths,
    q,
    row_maxima,
    row_sums,
    accepted,
    scales,
    residuals,
    targets,
    width,
    chunks,
    depth,
    BLOCK: tl.constexpr,
):
    """Each chunk's sums of the residual and of p at the first position not accepted, float64 [B, C]."""
    block, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    first, length = tl.load(first_rows + block), tl.load(lengths + block)
    position, scale = tl.load(accepted + block), tl.load(scales + block)
    p, residual = following_weights(
        scores, first, block, position, q, row_maxima, row_sums, scale, ids, width, length, depth
    )
    tl.store(residuals + block * chunks + chunk, tl.sum(residual.to(tl.float64), 0))
    tl.store(targets + block * chunks + chunk, tl.sum(p.to(tl.float64), 0))


@triton.jit
def draw_kernel(
    scores,
    first_rows,
    lengths,
    uniforms,
    q,
    row_maxima,
    row_sums,
    accepted,
    scales,
    residuals,
    targets,
    tokens,
    width,
    chunks,
    depth,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The token that follows: the first id whose running sum exceeds uniform times total, int64 [B]."""
    block = tl.program_id(0).to(tl.int64)
    first, length = tl.load(first_rows + block), tl.load(lengths + block)
    position, scale = tl.load(accepted + block), tl.load(scales + block)
    every = tl.arange(0, CHUNKS)
    here = every < chunks
    parts = tl.load(residuals + block * chunks + every, mask=here, other=0.0)
    # Where p <= q everywhere, p equals q: only rounding can reject there, and p is the limit of the residual.
    is_empty = tl.sum(parts, 0) == 0
    parts = tl.where(is_empty, tl.load(targets + block * chunks + every, mask=here, other=0.0), parts)
    running = tl.cumsum(parts, 0)
    goal = tl.load(uniforms + block * (depth + 1) + length) * tl.max(running, 0)
    chunk = tl.min(tl.where((running > goal) & (parts > 0), every, CHUNKS), 0)
    # Rounding cannot leave the goal unreached: the uniform is below 1. Stay inside all the same.
    chunk = tl.minimum(chunk, chunks - 1)
    before = tl.sum(tl.where(every < chunk, parts, 0.0), 0)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    p, residual = following_weights(
        scores, first, block, position, q, row_maxima, row_sums, scale, ids, width, length, depth
    )
    weights = tl.where(is_empty, p, residual).to(tl.float64)
    reached = (before + tl.cumsum(weights, 0) > goal) & (weights > 0)
    token = tl.min(tl.where(reached, ids, 2147483647), 0)
    # The chunk's own sum may round to just below what its parts add up to: then its last token with a weight.
    last = tl.max(tl.where(weights > 0, ids, 0), 0)
    tl.store(tokens + block, tl.minimum(token, last).to(tl.int64))


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every kernel reads: scores, where blocks begin and how long they are; sizes."""

    scores: Tensor
    first_rows: Tensor
    lengths: Tensor

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.scores.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.scores, self.first_rows, self.lengths


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
    (blocks, depth), width = drafts.shape, scores.shape[1]
    chunks = triton.cdiv(width, BLOCK)
    at = _Shared(scores.contiguous(), first_rows, lengths)
    q, uniforms, drafts = q.contiguous(), uniforms.contiguous(), drafts.contiguous()
    sizes = (width, chunks, depth)
    block: dict[str, Any] = {"BLOCK": BLOCK}
    padded: dict[str, Any] = {"CHUNKS": triton.next_power_of_2(chunks)}
    maxima = at.empty(blocks, depth + 1, chunks, dtype=torch.float32)
    sums = at.empty(blocks, depth + 1, chunks, dtype=torch.float64)
    launch(row_stats_kernel, (blocks, depth + 1, chunks), *at.tensors, maxima, sums, *sizes, **block)
    rows = tuple(at.empty(blocks, depth + 1, dtype=torch.float32) for _ in range(2))
    ratios, joint = (at.empty(blocks, depth, dtype=torch.float64) for _ in range(2))
    known = (*at.tensors, drafts, q, maxima, sums, *rows, ratios, joint, *sizes)
    launch(joint_kernel, (blocks,), *known, **padded)
    surplus = at.empty(blocks, depth, chunks, dtype=torch.float64)
    if by_block and depth > 1:
        known = (*at.tensors, q, *rows, joint, surplus, *sizes)
        launch(surplus_kernel, (blocks, depth - 1, chunks), *known, **block)
    accepted = at.empty(blocks, dtype=torch.int64)
    scales = at.empty(blocks, dtype=torch.float32)
    known = (lengths, uniforms, ratios, joint, surplus, accepted, scales, chunks, depth)
    launch(accept_kernel, (blocks,), *known, BY_BLOCK=by_block, **padded)
    residuals, targets = (at.empty(blocks, chunks, dtype=torch.float64) for _ in range(2))
    chosen = (*rows, accepted, scales, residuals, targets)
    launch(residual_kernel, (blocks, chunks), *at.tensors, q, *chosen, *sizes, **block)
    tokens = at.empty(blocks, dtype=torch.int64)
    known = (*at.tensors, uniforms, q, *chosen, tokens, *sizes)
    launch(draw_kernel, (blocks,), *known, **block, **padded)
    return accepted, tokens
