"""From the members' logits to tokens: weighted sum, temperature, argmax with or without seeded Gumbel noise.

The vocabulary is cut into chunks, a program each, so that few rows fill a GPU too. Three launches and no atomics:
``combine_kernel`` adds the members and finds each chunk's maximum; ``perturb_kernel`` warps sampled rows and adds
noise; ``pick_kernel`` takes the best chunk. Ties keep the lower id. The noise is that of ``kernels.noise``: the same
64-bit words, the same uniforms, logarithms in float64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.kernels.gpu.runtime import launch

BLOCK = 1024
# SplitMix64's numbers as signed words, see kernels.noise.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def combine_kernel(
    members,  # a tuple of pointers to fp32 [rows, V]
    strides,  # of their rows
    weights,  # fp32 [rows, members]
    logits,
    best_values,
    best_ids,
    width,
    chunks,
    BLOCK: tl.constexpr,
):
    """logits = sum_i w_i s_i, fp32 [rows, V]; each chunk's maximum and its id [rows, chunks]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = ids < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(members)):
        weight = tl.load(weights + row * len(members) + i)
        own = tl.load(members[i] + row * strides[i] + ids, mask=inside, other=0.0)
        # A member of weight 0 is left out, also where its logit is minus infinity.
        total += weight * tl.where(weight == 0.0, 0.0, own)
    tl.store(logits + row * width + ids, total, mask=inside)
    value, at = tl.max(tl.where(inside, total, float("-inf")), 0, return_indices=True)
    tl.store(best_values + row * chunks + chunk, value)
    tl.store(best_ids + row * chunks + chunk, chunk * BLOCK + at)


@triton.jit
def xor_shift(words, BITS: tl.constexpr):
    """words ^ (words >>> BITS) on int64."""
    return words ^ (words.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def gumbel_noise(key, ids):
    """Standard Gumbel noise, fp32, of the stream that starts at ``key`` for token ids."""
    words = key + ids.to(tl.int64) * _GAMMA
    words = xor_shift(words, 30) * _MULTIPLIER_1
    words = xor_shift(words, 27) * _MULTIPLIER_2
    words = xor_shift(words, 31)
    high = (words.to(tl.uint64, bitcast=True) >> 12).to(tl.int64, bitcast=True)
    uniform = (high.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def perturb_kernel(
    logits,
    temperatures,
    keys,
    is_sampled,
    best_values,
    noisy_values,
    noisy_ids,
    width,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Each chunk's best warped and perturbed token of sampled rows; greedy rows are left alone."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(is_sampled + row) != 0:
        temperature = tl.load(temperatures + row)
        every = tl.arange(0, CHUNKS)
        maxima = tl.load(best_values + row * chunks + every, mask=every < chunks, other=float("-inf"))
        # The maximum goes first, so that a tiny temperature yields 0 and -inf; a temperature of 1 changes no bit.
        shift = tl.where(temperature == 1.0, 0.0, tl.max(maxima, 0))
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = ids < width
        own = tl.load(logits + row * width + ids, mask=inside, other=float("-inf"))
        warped = tl.div_rn(own - shift, tl.zeros([BLOCK], tl.float32) + temperature)
        noisy = warped + gumbel_noise(tl.load(keys + row), ids)
        value, at = tl.max(tl.where(inside, noisy, float("-inf")), 0, return_indices=True)
        tl.store(noisy_values + row * chunks + chunk, value)
        tl.store(noisy_ids + row * chunks + chunk, chunk * BLOCK + at)


@triton.jit
def pick_kernel(
    is_sampled, best_values, best_ids, noisy_values, noisy_ids, tokens, chunks, CHUNKS: tl.constexpr
):
    """The best chunk's id, int64 [rows]."""
    row = tl.program_id(0)
    at = row * chunks + tl.arange(0, CHUNKS)
    here = tl.arange(0, CHUNKS) < chunks
    if tl.load(is_sampled + row) != 0:
        values = tl.load(noisy_values + at, mask=here, other=float("-inf"))
        ids = tl.load(noisy_ids + at, mask=here, other=0)
    else:
        values = tl.load(best_values + at, mask=here, other=float("-inf"))
        ids = tl.load(best_ids + at, mask=here, other=0)
    # Among equals the lowest id; ids rise with the chunks, and those that do not exist lose.
    leading = here & (values == tl.max(values, 0))
    tl.store(tokens + row, tl.min(tl.where(leading, ids, 2147483647), 0).to(tl.int64))


def combine(
    members: Sequence[Tensor], weights: Tensor, temperatures: Tensor, keys: Tensor, is_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``ops.combine``."""
    rows, width = members[0].shape
    device = members[0].device
    members = [m if m.stride(1) == 1 else m.contiguous() for m in members]
    chunks = triton.cdiv(width, BLOCK)
    logits = torch.empty(rows, width, device=device)
    values = torch.empty(2, rows, chunks, device=device)
    ids = torch.empty(2, rows, chunks, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens, logits
    sampled = is_sampled.to(torch.int8)
    sizes = {"BLOCK": BLOCK, "enable_fp_fusion": False}  # fused sums would round otherwise than torch's
    launch(
        combine_kernel,
        (rows, chunks),
        tuple(members),
        tuple(m.stride(0) for m in members),
        weights.contiguous(),
        logits,
        values[0],
        ids[0],
        width,
        chunks,
        **sizes,
    )
    padded = triton.next_power_of_2(chunks)
    if bool(is_sampled.any()):
        rest = (temperatures, keys, sampled, values[0], values[1], ids[1], width, chunks)
        launch(perturb_kernel, (rows, chunks), logits, *rest, CHUNKS=padded, **sizes)
    launch(pick_kernel, (rows,), sampled, values[0], ids[0], values[1], ids[1], tokens, chunks, CHUNKS=padded)
    return tokens, logits
