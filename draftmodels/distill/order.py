"""What comes when, as pure functions of (seed, round): prompts of a round, who answers them, batches of a pool.

That is why a job that was killed goes on exactly where it was: nothing random is carried along.
"""

from collections.abc import Sequence

from paceline.draftmodels.data.seeds import derive_seed, epoch_order

#: Seeds have 63 bits.
_SEEDS = 2**63


def prompts_of_round(count: int, per_round: int, round_: int, seed: int) -> list[int]:
    """Indices of a round's prompts: all ``count`` prompts once in random order, then again in another one."""
    wanted = range(round_ * per_round, (round_ + 1) * per_round)
    orders = {
        epoch: epoch_order(count, derive_seed(seed, "prompts"), epoch)
        for epoch in {i // count for i in wanted}
    }
    return [orders[i // count][i % count] for i in wanted]


def from_draft(count: int, share: float, round_: int, seed: int) -> list[bool]:
    """For each of a round's prompts, whether the draft answers it; each with probability ``share``."""
    return [derive_seed(seed, "writer", round_, i) < share * _SEEDS for i in range(count)]


def batches(rows: Sequence[int], batch_rows: int, round_: int, seed: int) -> list[list[int]]:
    """Indices of a pool's sequences in random order, cut into batches of about ``batch_rows`` rows.

    Args:
        rows: of each sequence.
    """
    result: list[list[int]] = []
    filled = batch_rows
    for index in epoch_order(len(rows), derive_seed(seed, "batches"), round_):
        if filled >= batch_rows or (result and filled + rows[index] > 1.25 * batch_rows):
            result.append([])
            filled = 0
        result[-1].append(index)
        filled += rows[index]
    return result
