"""Gumbel noise of streams of 64-bit words, in torch: what kernels of seeded draws are held to.

A key starts a SplitMix64 stream that the token id indexes. torch lacks unsigned 64-bit arithmetic on some devices:
words live in int64, with wrapping products and masked (logical) shifts. How keys are made of a request's seed is not
known here.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
#: Uniforms are (k + 1/2) / 2**52 with 0 <= k < 2**52: exact in float64 and strictly between 0 and 1.
_UNIFORM_BITS = 52
#: On a CPU, rows are made in groups of about this many tokens, whose buffers stay in its caches: 2.3 times as quick as
#: all 32 rows of 49k tokens at once.
_CACHED_WORDS = 1 << 16


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def streams(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of the streams that start at ``keys``, int64 [R]; the native CPU kernel has the same bits
    but for the last one of a rare value.

    Returns:
        float32 [R, V] on the device of ``keys``, finite, between about -3.6 and 36.8.
    """
    device = keys.device
    steps = torch.arange(vocab_size, dtype=torch.int64, device=device) * signed(GAMMA)
    noise = torch.empty(len(keys), vocab_size, device=device)
    rows = len(keys) if device.type != "cpu" else min(len(keys), max(1, _CACHED_WORDS // vocab_size))
    words = torch.empty(rows, vocab_size, dtype=torch.int64, device=device)
    scratch, uniforms = torch.empty_like(words), torch.empty_like(words, dtype=torch.float64)
    for first in range(0, len(keys), max(1, rows)):
        part, count = noise[first : first + rows], min(rows, len(keys) - first)
        torch.add(keys[first : first + rows, None], steps, out=words[:count])
        _mix_(words[:count], scratch[:count])
        part.copy_(_gumbel_(words[:count], uniforms[:count]))
    return noise


def _xor_shift_(words: Tensor, bits: int, scratch: Tensor) -> None:
    """In place ``words ^= words >>> bits`` (logical shift)."""
    torch.bitwise_right_shift(words, bits, out=scratch)
    scratch &= (1 << (64 - bits)) - 1
    words ^= scratch


def _mix_(words: Tensor, scratch: Tensor) -> None:
    """SplitMix64's finaliser in place on int64 words; ``scratch`` is of the same shape."""
    _xor_shift_(words, 30, scratch)
    words *= signed(MULTIPLIER_1)
    _xor_shift_(words, 27, scratch)
    words *= signed(MULTIPLIER_2)
    _xor_shift_(words, 31, scratch)


def _gumbel_(words: Tensor, out: Tensor) -> Tensor:
    """Random words to float64 noise in ``out``; the words are used up."""
    words >>= 64 - _UNIFORM_BITS
    words &= (1 << _UNIFORM_BITS) - 1
    return out.copy_(words).add_(0.5).mul_(2.0**-_UNIFORM_BITS).log_().neg_().log_().neg_()
