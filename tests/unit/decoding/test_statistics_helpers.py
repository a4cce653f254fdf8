import numpy as np
import pytest
from statistics_helpers import joint_chi_square, joint_counts, joint_probabilities


def test_p_values_are_uniform_under_the_true_distribution() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(27, 0.3)).reshape(3, 3, 3)
    values = [joint_chi_square(rng.multinomial(5000, probs.ravel()), probs.ravel()) for _ in range(400)]
    assert 0.4 < np.mean(values) < 0.6
    assert 0.005 < np.mean(np.asarray(values) < 0.05) < 0.12


def test_a_small_bias_is_rejected() -> None:
    rng = np.random.default_rng(1)
    probs = np.full(8, 1 / 8)
    biased = probs + np.array([0.01, -0.01, 0, 0, 0, 0, 0, 0])
    assert joint_chi_square(rng.multinomial(200_000, biased), probs) < 1e-10


def test_impossible_cell_is_rejected_and_tiny_cells_are_pooled() -> None:
    assert joint_chi_square([99, 1, 0], [1.0, 0.0, 0.0]) == 0.0
    # Two cells of 0.5 expected counts each, both full: unpooled they would be refused at once.
    assert joint_chi_square([500, 498, 1, 1], [0.5, 0.499, 0.0005, 0.0005]) > 0.9


def test_joint_counts_and_probabilities_share_their_axes() -> None:
    counts = joint_counts([[0, 1], [0, 1], [2, 0]], vocab_size=3)
    assert counts[0, 1] == 2
    assert counts[2, 0] == 1
    assert counts.sum() == 3

    def next_probs(prefix: tuple[int, ...]) -> list[float]:
        return [0.5, 0.3, 0.2] if not prefix else [0.0, 1.0, 0.0]

    joint = joint_probabilities(next_probs, vocab_size=3, depth=2)
    assert joint[1].tolist() == pytest.approx([0, 0.3, 0])
    assert joint.sum() == pytest.approx(1)
