"""Statistical checks shared by the tests: does a sample follow a known discrete distribution?

Plain numpy and scipy; knows nothing of the code under test. Joint distributions over several consecutive
tokens are arrays with one axis per token.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def joint_counts(samples: npt.ArrayLike, vocab_size: int) -> Ints:
    """Count sequences: samples [n, depth] of token ids -> counts [vocab_size] * depth."""
    tokens = np.asarray(samples, dtype=np.int64)
    shape = (vocab_size,) * tokens.shape[1]
    flat = np.ravel_multi_index(tuple(tokens.T), shape)
    return np.bincount(flat, minlength=vocab_size ** tokens.shape[1]).reshape(shape).astype(np.int64)


def joint_probabilities(
    next_probs: Callable[[tuple[int, ...]], Sequence[float] | Floats], vocab_size: int, depth: int
) -> Floats:
    """Probability of every sequence of ``depth`` tokens, given the next-token distribution after each prefix.

    Returns:
        float64 [vocab_size] * depth, sums to 1.
    """
    joint = np.zeros((vocab_size,) * depth)
    for prefix in np.ndindex(*(vocab_size,) * (depth - 1)):
        mass = 1.0
        for at, token in enumerate(prefix):
            mass *= float(next_probs(prefix[:at])[token])
        joint[prefix] = mass * np.asarray(next_probs(prefix), dtype=np.float64)
    return joint


def joint_chi_square(
    counts: npt.ArrayLike, expected_probs: npt.ArrayLike, *, min_expected: float = 5.0
) -> float:
    """p-value of Pearson's test that ``counts`` were drawn from ``expected_probs`` (same shape, any rank).

    Cells whose expected count is below ``min_expected`` are pooled; if the pool is still below it, it joins
    the smallest of the other cells. A count in a cell of probability zero gives 0.0 at once.
    """
    observed = np.asarray(counts, dtype=np.float64).ravel()
    probs = np.asarray(expected_probs, dtype=np.float64).ravel()
    assert observed.shape == probs.shape, f"{observed.shape} counts for {probs.shape} probabilities"
    assert abs(probs.sum() - 1) < 1e-5, f"probabilities sum to {probs.sum()}"
    if (observed[probs <= 0] > 0).any():
        return 0.0
    observed, expected = observed[probs > 0], probs[probs > 0] / probs.sum() * observed.sum()
    small = expected < min_expected
    if small.any():
        pooled = np.array([observed[small].sum()]), np.array([expected[small].sum()])
        observed, expected = observed[~small], expected[~small]
        if pooled[1][0] >= min_expected or not len(expected):
            observed, expected = np.append(observed, pooled[0]), np.append(expected, pooled[1])
        else:
            at = int(expected.argmin())
            observed[at] += pooled[0][0]
            expected[at] += pooled[1][0]
    if len(expected) < 2:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, df=len(expected) - 1))
