"""Counter-based Gumbel noise for requests with a seed.

Owns one pure function: noise = f(seed, choice, position, token id). No state, no generator, no other row
enters, so a token's noise is the same alone or in a crowd, for the draft and for the target, before and after
a preemption. That is what coupled (drafter-invariant) verification rests on (Daliri et al., 2408.07978).

Construction: seed, choice and position are absorbed into a 64-bit key with the finaliser of SplitMix64 (a
bijection of 64-bit words); the key starts a SplitMix64 stream that the token id indexes. torch lacks unsigned
64-bit arithmetic on some devices: words live in int64, with wrapping products and masked (logical) shifts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.library import available
from paceline.kernels.cpu.library import gumbel as native_gumbel

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
#: Uniforms are (k + 1/2) / 2**52 with 0 <= k < 2**52: exact in float64 and strictly between 0 and 1.
_UNIFORM_BITS = 52
#: On a CPU, rows are made in groups of about this many tokens, whose buffers stay in its caches: 2.3 times as quick as
#: all 32 rows of 49k tokens at once.
_CACHED_WORDS = 1 << 16


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def _mix(word: int) -> int:
    """SplitMix64's finaliser on a Python integer."""
    word = ((word ^ (word >> 30)) * _MULTIPLIER_1) & _WORD
    word = ((word ^ (word >> 27)) * _MULTIPLIER_2) & _WORD
    return word ^ (word >> 31)


def stream(seed: int, choice: int) -> int:
    """64-bit word that a choice's positions go into; integers enter modulo 2**64, so negative seeds are fine."""
    return _absorb(_absorb(0, seed), choice)


def _absorb(key: int, word: int) -> int:
    return _mix((key + _GAMMA & _WORD) ^ (word & _WORD))


def _xor_shift_(words: Tensor, bits: int, scratch: Tensor) -> None:
    """In place ``words ^= words >>> bits`` (logical shift)."""
    torch.bitwise_right_shift(words, bits, out=scratch)
    scratch &= (1 << (64 - bits)) - 1
    words ^= scratch


def _mix_(words: Tensor, scratch: Tensor) -> None:
    """SplitMix64's finaliser in place on int64 words; ``scratch`` is of the same shape."""
    _xor_shift_(words, 30, scratch)
    words *= _signed(_MULTIPLIER_1)
    _xor_shift_(words, 27, scratch)
    words *= _signed(_MULTIPLIER_2)
    _xor_shift_(words, 31, scratch)


def gumbel(
    seeds: Sequence[int],
    choices: Sequence[int],
    positions: Sequence[int],
    vocab_size: int,
    device: torch.device | str,
) -> Tensor:
    """Standard Gumbel noise for every token of every row.

    Args:
        seeds: the request's seed, per row; taken modulo 2**64.
        choices: choice index, per row.
        positions: absolute position of the token about to be drawn, per row.
        vocab_size: V.
        device: where the result is wanted.

    Returns:
        float32 [R, V], finite, between about -3.6 and 36.8.
    """
    rows = zip(seeds, choices, positions, strict=True)
    keys = [_signed(_absorb(stream(seed, choice), position)) for seed, choice, position in rows]
    if torch.device(device).type == "cpu" and available():
        return native_gumbel(torch.tensor(keys, dtype=torch.int64), vocab_size)
    return streams(torch.tensor(keys, dtype=torch.int64, device=device), vocab_size)


def streams(keys: Tensor, vocab_size: int) -> Tensor:
    """The noise of streams that start at ``keys``, int64 [R], in torch; the native kernel has the same bits but for the
    last one of a rare value.

    Returns:
        float32 [R, V] on the device of ``keys``.
    """
    device = keys.device
    steps = torch.arange(vocab_size, dtype=torch.int64, device=device) * _signed(_GAMMA)
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


def _gumbel_(words: Tensor, out: Tensor) -> Tensor:
    """Random words to float64 noise in ``out``; the words are used up."""
    words >>= 64 - _UNIFORM_BITS
    words &= (1 << _UNIFORM_BITS) - 1
    return out.copy_(words).add_(0.5).mul_(2.0**-_UNIFORM_BITS).log_().neg_().log_().neg_()
