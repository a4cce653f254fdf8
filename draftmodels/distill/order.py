"""What comes when, as pure functions of (seed, round): prompts of a round, who answers them, batches of a pool.

That is why a job that was killed goes on exactly where it was: nothing random is carried along.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch


class _Purpose(IntEnum):
    """Keeps draws for different purposes apart."""

    PROMPTS = 1
    WRITERS = 2
    BATCHES = 3


def prompts_of_round(count: int, per_round: int, round_: int, seed: int) -> list[int]:
    """Indices of a round's prompts: all ``count`` prompts once in random order, then again in another one."""
    wanted = range(round_ * per_round, (round_ + 1) * per_round)
    orders = {epoch: _permutation(count, seed, _Purpose.PROMPTS, epoch) for epoch in {i // count for i in wanted}}
    return [orders[i // count][i % count] for i in wanted]


def from_draft(count: int, share: float, round_: int, seed: int) -> list[bool]:
    """For each of a round's prompts, whether the draft answers it; each with probability ``share``."""
    draws = torch.rand(count, generator=_generator(seed, _Purpose.WRITERS, round_))
    return [draw < share for draw in draws.tolist()]


def batches(rows: Sequence[int], batch_rows: int, round_: int, seed: int) -> list[list[int]]:
    """Indices of a pool's sequences in random order, cut into batches of about ``batch_rows`` rows.

    Args:
        rows: of each sequence.
    """
    result: list[list[int]] = []
    filled = batch_rows
    for index in _permutation(len(rows), seed, _Purpose.BATCHES, round_):
        if filled >= batch_rows or (result and filled + rows[index] > 1.25 * batch_rows):
            result.append([])
            filled = 0
        result[-1].append(index)
        filled += rows[index]
    return result


def round_seed(seed: int, round_: int) -> int:
    """Sampling seed of a round's answers."""
    return int(torch.randint(2**31, (1,), generator=_generator(seed, 0, round_)))


def _permutation(count: int, seed: int, purpose: int, number: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed, purpose, number)).tolist()
    return order


def _generator(seed: int, purpose: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed << 40) ^ (purpose << 32) ^ number) % 2**63)
