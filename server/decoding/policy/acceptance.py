"""Estimates of the chance that a draft token is accepted, with exponential forgetting and a prior.

The first position of a block and the later ones are told apart: a copied n-gram that starts right mostly goes on
right, whereas a draft model tires. Evidence is counted as in a Beta distribution, hits and trials; the prior is so
many pseudo-trials at the model-wide estimate.
"""

from dataclasses import dataclass, field

#: A later position is never thought certain, so that the gain of one more token falls with its position.
_LIMITS = (0.005, 0.99)


@dataclass(slots=True)
class _Counts:
    hits: float = 0.0
    trials: float = 0.0

    def fade(self, keep: float) -> None:
        self.hits *= keep
        self.trials *= keep

    def add(self, hits: int, trials: int) -> None:
        self.hits += hits
        self.trials += trials

    def mean(self, prior: float, weight: float) -> float:
        low, high = _LIMITS
        return min(max((self.hits + weight * prior) / (self.trials + weight), low), high)


@dataclass(slots=True)
class Acceptance:
    """One estimate, of a sequence or model-wide.

    Args:
        keep: factor on old evidence with every block.
        weight: pseudo-trials of the prior.
    """

    keep: float
    weight: float
    _first: _Counts = field(default_factory=_Counts)
    _later: _Counts = field(default_factory=_Counts)

    def add(self, drafted: int, accepted: int, *, age: float = 1.0) -> None:
        """Count a verified block of ``drafted`` >= 1 tokens.

        Only positions up to the first rejection were examined.

        Args:
            age: further factor on the evidence so far, for the time in which nothing was drafted.
        """
        for counts in (self._first, self._later):
            counts.fade(self.keep * age)
        examined = min(accepted + 1, drafted)
        self._first.add(min(accepted, 1), 1)
        self._later.add(max(accepted - 1, 0), examined - 1)

    def rates(self, prior: tuple[float, float]) -> tuple[float, float]:
        """Chance of the first position, and of a later one if all before it were accepted."""
        return self._first.mean(prior[0], self.weight), self._later.mean(prior[1], self.weight)


def gains(rates: tuple[float, float], limit: int, floor: float) -> list[float]:
    """Chance that draft token j = 1, 2, ... is accepted, falling; cut at ``limit`` tokens or below ``floor``."""
    result: list[float] = []
    gain = rates[0]
    while len(result) < limit and gain >= floor:
        result.append(gain)
        gain *= rates[1]
    return result
