"""Sparsity per layer: uniform, and by outliers (OWL)."""

import pytest
import torch

from paceline.draftmodels.prune.allocation import outlier_ratio, owl, uniform


def test_uniform_is_uniform() -> None:
    assert uniform(0.6, 3) == [0.6, 0.6, 0.6]


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_owl_keeps_mean_and_bounds_and_spares_layers_with_outliers(sparsity: float) -> None:
    ratios = [0.09, 0.01, 0.02, 0.05, 0.011]
    found = owl(ratios, sparsity, 0.08)
    assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-12)
    assert max(abs(s - sparsity) for s in found) == pytest.approx(0.08)
    ranked = sorted(range(5), key=lambda i: ratios[i])
    assert ranked == sorted(range(5), key=lambda i: -found[i])


def test_owl_of_equal_layers_is_uniform() -> None:
    assert owl([0.03, 0.03], 0.5, 0.1) == [0.5, 0.5]


def test_the_outlier_ratio_counts_over_the_whole_block() -> None:
    small, large = torch.ones(3, 30), torch.ones(1, 10)
    large[0, :2] = 100.0  # mean (98 + 200) / 100 = 2.98
    assert outlier_ratio([small, large], 5.0) == pytest.approx(2 / 100)
    assert outlier_ratio([small, large], 50.0) == 0.0
