"""Draft lengths by batch size from what steps cost, as ``draft_schedule`` has them. Plain numbers, no vLLM.

A step of n sequences that each verify k drafted tokens takes t(n, k) seconds. Drafting is k forwards, verification
n (k + 1) rows, both linear in k, so that t(n, 0) and t(n, K) give all in between. Of a block
1 + sum_{j<=k} prod_{i<=j} a_i tokens are committed, a_i being the acceptance rate at position i (arXiv:2211.17192): the
length with most of them per second is the best for n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

#: A length has to win by this share over not drafting: measurements of one engine scatter by about as much.
LEAST_WIN = 0.03


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Median seconds of a step of one batch size, without drafting and with the longest blocks."""

    plain: float
    longest: float


def tokens_per_block(alphas: Sequence[float], length: int) -> float:
    """Committed tokens of a block, the bonus or recovered token included.

    Args:
        alphas: acceptance rate at each position, given that all before were accepted.
    """
    return 1.0 + sum(math.prod(alphas[: position + 1]) for position in range(length))


def best_length(seconds: StepSeconds, alphas: Sequence[float]) -> int:
    """The draft length with most tokens per second; 0 unless one wins by ``LEAST_WIN``."""
    longest = len(alphas)

    def rate(length: int) -> float:
        taken = seconds.plain + (seconds.longest - seconds.plain) * length / longest
        return tokens_per_block(alphas, length) / taken

    best = max(range(longest + 1), key=rate)
    return best if rate(best) >= (1 + LEAST_WIN) * rate(0) else 0


def schedule(measured: Mapping[int, StepSeconds], alphas: Sequence[float]) -> list[str]:
    """``draft_schedule``; a batch size that was not measured counts as the next larger one that was, or the largest."""
    best = [(size, best_length(measured[size], alphas)) for size in sorted(measured)]
    runs = [
        (length, [size for size, _ in group]) for length, group in groupby(best, key=lambda pair: pair[1])
    ]
    return [f"{sizes[-1]}:{length}" for length, sizes in runs[:-1]] + [str(runs[-1][0])]


def alphas_of(accepted: Sequence[int], longest: int) -> list[float]:
    """Acceptance rate at each position of blocks of ``longest`` tokens, of which so many were accepted."""
    reached = [sum(count >= position for count in accepted) for position in range(longest + 1)]
    return [after / before if before else 0.0 for before, after in pairwise(reached)]
