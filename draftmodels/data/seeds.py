"""Seeds from seeds: every random choice of a job is a function of its one seed and of what the choice is about.

Hashes rather than generators, so that the same words give the same numbers on every machine and with every version of
every library, and no state has to be saved for a job to go on where it was killed.
"""

from hashlib import blake2b

#: Seeds have this many bits: torch takes signed 64-bit ones.
_BITS = 63


def derive_seed(seed: int, *words: int | str) -> int:
    """A seed for what ``words`` name, 0 <= result < 2**63; different words give unrelated seeds."""
    text = "\0".join(f"{type(word).__name__}:{word}" for word in (seed, *words))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - _BITS)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers 0 to ``count`` - 1 in the order of an epoch: a permutation that looks random."""
    keys = [derive_seed(seed, "order", epoch, index) for index in range(count)]
    return sorted(range(count), key=keys.__getitem__)
