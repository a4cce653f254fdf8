"""Counter-based Gumbel noise for requests with a seed.

Owns one pure function: noise = f(seed, choice, position, token id). No state, no generator, no other row
enters, so a token's noise is the same alone or in a crowd, for the draft and for the target, before and after
a preemption. That is what coupled (drafter-invariant) verification rests on (Daliri et al., 2408.07978).

Construction: seed, choice and position are absorbed into a 64-bit key with the finaliser of SplitMix64 (a
bijection of 64-bit words); the key starts a SplitMix64 stream that the token id indexes (``kernels.noise``).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.library import available
from paceline.kernels.cpu.library import gumbel as native_gumbel
from paceline.kernels.noise import GAMMA, MULTIPLIER_1, MULTIPLIER_2, signed, streams

_WORD = (1 << 64) - 1


def _mix(word: int) -> int:
    """SplitMix64's finaliser on a Python integer."""
    word = ((word ^ (word >> 30)) * MULTIPLIER_1) & _WORD
    word = ((word ^ (word >> 27)) * MULTIPLIER_2) & _WORD
    return word ^ (word >> 31)


def stream(seed: int, choice: int) -> int:
    """64-bit word that a choice's positions go into; integers enter modulo 2**64, so negative seeds are fine."""
    return _absorb(_absorb(0, seed), choice)


def _absorb(key: int, word: int) -> int:
    return _mix((key + GAMMA & _WORD) ^ (word & _WORD))


def keys(rows: Iterable[tuple[int, int, int]]) -> Tensor:
    """Where the noise of rows starts, each a (seed, choice, position): int64 [R]."""
    words = [signed(_absorb(stream(seed, choice), position)) for seed, choice, position in rows]
    return torch.tensor(words, dtype=torch.int64)


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
    started = keys(zip(seeds, choices, positions, strict=True))
    if torch.device(device).type == "cpu" and available():
        return native_gumbel(started, vocab_size)
    return streams(started.to(device), vocab_size)
