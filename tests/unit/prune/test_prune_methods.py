"""Magnitude, Wanda and SparseGPT on single matrices, SparseGPT against a naive Optimal Brain Surgeon in fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paceline.draftmodels.prune.goal import Goal, Pruned, kept_in_groups, lowest, lowest_per_row
from paceline.draftmodels.prune.inputs import output_error
from paceline.draftmodels.prune.magnitude import magnitude
from paceline.draftmodels.prune.sparsegpt import inverse_factor, sparsegpt
from paceline.draftmodels.prune.values import restored, stored
from paceline.draftmodels.prune.wanda import wanda
from paceline.kernels.formats import VALUE_DTYPES, Pattern, ValueDtype
from paceline.server.errors import ArtifactError

PATTERNS = ("unstructured", "2:4", "16:32", "16:64")


def goal_of(pattern: str, sparsity: float = 0.5) -> Goal:
    parsed = Pattern.parse(pattern)
    return Goal(parsed, sparsity if parsed.density is None else 1 - parsed.density)


def correlated_inputs(width: int, rows: int = 400, seed: int = 0) -> Tensor:
    """fp64 [width, rows]: mixed with each other, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    noise = torch.randn(width, rows, generator=generator, dtype=torch.float64)
    sizes = torch.rand(width, 1, generator=generator, dtype=torch.float64) ** 2 + 0.02
    return sizes * ((mix + 0.5 * torch.eye(width, dtype=torch.float64)) @ noise + noise.mean(0))


def random_weight(out: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_magnitude(weight: Tensor, gram: Tensor, goal: Goal) -> Pruned:
    return magnitude(weight, goal)


def by_wanda(weight: Tensor, gram: Tensor, goal: Goal) -> Pruned:
    return wanda(weight, gram.diagonal(), goal)


def by_sparsegpt(weight: Tensor, gram: Tensor, goal: Goal) -> Pruned:
    return sparsegpt(weight, inverse_factor(gram, 0.01), goal, block_size=64)


METHODS = (by_magnitude, by_wanda, by_sparsegpt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exactly_as_many_weights_stay_as_the_pattern_says(
    method: Callable[[Tensor, Tensor, Goal], Pruned], pattern: str
) -> None:
    inputs, weight = correlated_inputs(128), random_weight(24, 128)
    goal = goal_of(pattern)
    pruned = method(weight, inputs @ inputs.T, goal)
    assert not pruned.weight[~pruned.kept].any()
    if goal.pattern.structured:
        groups = pruned.kept.view(-1, goal.pattern.m).sum(1)
        assert (groups == goal.pattern.n).all()
    else:
        assert int(pruned.kept.sum()) == weight.numel() // 2
    assert 0 < int((pruned.weight != 0).sum()) <= int(pruned.kept.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.617, 0.95])
def test_odd_sparsities_are_exact_to_one_weight(
    method: Callable[[Tensor, Tensor, Goal], Pruned], sparsity: float
) -> None:
    inputs, weight = correlated_inputs(50), random_weight(7, 50)
    kept = method(weight, inputs @ inputs.T, goal_of("unstructured", sparsity)).kept
    assert int((~kept).sum()) == math.floor(sparsity * 350 + 0.5)


def test_wanda_compares_within_rows_and_magnitude_over_the_matrix() -> None:
    weight = random_weight(4, 20) * torch.tensor([[0.01], [1.0], [10.0], [100.0]])
    goal = goal_of("unstructured")
    assert wanda(weight, torch.ones(20, dtype=torch.float64), goal).kept.sum(1).tolist() == [10] * 4
    assert magnitude(weight, goal).kept.sum(1).tolist()[0] == 0


def test_wanda_looks_at_input_norms() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0, 0.5]])
    squares = torch.tensor([0.01, 100.0, 0.01, 100.0])  # scores 0.3, 10, 0.2, 5
    assert wanda(weight, squares, goal_of("unstructured")).kept.tolist() == [[False, True, False, True]]
    assert wanda(weight, squares, goal_of("2:4")).kept.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16:32"])
def test_sparsegpt_loses_least_and_magnitude_most(pattern: str) -> None:
    inputs, weight = correlated_inputs(128), random_weight(48, 128)
    gram = inputs @ inputs.T
    errors = [
        output_error(weight, method(weight, gram, goal_of(pattern)).weight, gram)
        for method in (by_sparsegpt, by_wanda, by_magnitude)
    ]
    assert 0 < errors[0] < 0.8 * errors[1] < errors[1] < errors[2]


def naive_obs(weight: Tensor, inputs: Tensor, goal: Goal, damping: float, block: int) -> Pruned:
    """SparseGPT by its definition: the inverse Hessian of what is left anew for every column, updates at once."""
    width = weight.shape[1]
    hessian = 2 * inputs @ inputs.T
    hessian += damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    left, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)

    def cost(row: int, j: int) -> float:
        return float(left[row, j] ** 2 / inverses[j][0, 0])

    for j in range(width):
        if goal.pattern.structured and j % goal.pattern.m == 0:
            for row in range(len(weight)):
                group = sorted(range(j, j + goal.pattern.m), key=lambda k: cost(row, k))
                kept[row, group[: goal.pattern.m - goal.pattern.n]] = False
        elif not goal.pattern.structured and j % block == 0:
            stop = min(j + block, width)
            places = [(row, k) for row in range(len(weight)) for k in range(j, stop)]
            count = goal.removed(j * len(weight), stop * len(weight))
            for row, k in sorted(places, key=lambda place: cost(*place))[:count]:
                kept[row, k] = False
        for row in range(len(weight)):
            if not kept[row, j]:
                left[row, j:] -= left[row, j] / inverses[j][0, 0] * inverses[j][0]
                left[row, j] = 0.0
    return Pruned(left, kept)


@pytest.mark.parametrize(
    ("pattern", "block"), [("unstructured", 8), ("unstructured", 12), ("2:4", 8), ("4:8", 8)]
)
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern: str, block: int) -> None:
    inputs, weight = correlated_inputs(32, rows=60), random_weight(6, 32)
    goal = goal_of(pattern)
    expected = naive_obs(weight, inputs, goal, 0.01, block)
    got = sparsegpt(weight, inverse_factor(inputs @ inputs.T, 0.01), goal, block_size=block)
    assert torch.equal(got.kept, expected.kept)
    torch.testing.assert_close(got.weight, expected.weight, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(got.weight[got.kept], weight[got.kept])  # kept weights were adapted


def test_the_blocked_sweep_equals_the_unblocked_one() -> None:
    inputs, weight = correlated_inputs(96), random_weight(20, 96)
    factor, goal = inverse_factor(inputs @ inputs.T, 0.01), goal_of("2:4")
    whole = sparsegpt(weight, factor, goal, block_size=96)
    for block in (4, 20, 32, 64):
        blocked = sparsegpt(weight, factor, goal, block_size=block)
        assert torch.equal(blocked.kept, whole.kept)
        torch.testing.assert_close(blocked.weight, whole.weight, rtol=1e-9, atol=1e-12)


def test_the_factor_is_that_of_the_inverse_hessian() -> None:
    inputs = correlated_inputs(24)
    factor = inverse_factor(inputs @ inputs.T, 0.05)
    hessian = 2 * inputs @ inputs.T
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(hessian))
    assert factor.damping == 0.05


def test_dead_inputs_lose_their_weights_first_and_disturb_nothing() -> None:
    inputs, weight = correlated_inputs(32), random_weight(8, 32)
    inputs[[3, 17]] = 0.0
    gram, goal = inputs @ inputs.T, goal_of("unstructured")
    factor = inverse_factor(gram, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [3, 17]
    pruned = sparsegpt(weight, factor, goal, block_size=32)
    assert not pruned.weight[:, [3, 17]].any()
    assert not pruned.kept[:, [3, 17]].any()
    assert int(pruned.kept.sum()) == 128
    assert torch.isfinite(pruned.weight).all()
    assert not inverse_factor(torch.zeros(4, 4, dtype=torch.float64), 0.01).upper.isnan().any()


def test_damping_grows_until_the_hessian_can_be_factorised() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05  # not positive definite, as rounding may leave it
    factor = inverse_factor(gram, 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert torch.isfinite(factor.upper).all()


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_stored_is_what_was_kept(dtype: ValueDtype, pattern: str) -> None:
    inputs, weight = correlated_inputs(128), random_weight(8, 128).float()
    weight[2, 5] = -1e-30  # rounds to -0 in fp16
    pruned = by_sparsegpt(weight, inputs @ inputs.T, goal_of(pattern))
    kept = stored(pruned, Pattern.parse(pattern), dtype, "x")
    assert torch.equal(kept.kept(), pruned.kept)
    assert kept.value_dtype == dtype
    values = restored(kept, torch.device("cpu"))
    torch.testing.assert_close(values, pruned.weight, rtol=8e-3, atol=0.02 if dtype == "int8" else 1e-6)
    for tensor in (values, kept.values if dtype != "int8" else kept.scale):
        assert tensor is not None
        assert not (torch.signbit(tensor) & (tensor == 0)).any()


def test_no_method_leaves_a_negative_zero() -> None:
    weight = torch.full((4, 8), -0.0)
    for method in METHODS:
        kept = method(weight, torch.eye(8, dtype=torch.float64), goal_of("2:4"))
        assert not torch.signbit(kept.weight).any()


def test_values_that_fp16_cannot_hold_are_refused() -> None:
    weight = torch.full((2, 4), 1e6)
    pruned = magnitude(weight, goal_of("2:4"))
    with pytest.raises(ArtifactError, match="q_proj: pruned weights are too large for fp16"):
        stored(pruned, Pattern(2, 4), "fp16", "q_proj")


def test_choices_are_exact_among_equal_scores() -> None:
    same = torch.ones(3, 8)
    assert int(lowest(same, 11).sum()) == 11
    assert not lowest(same, 0).any()
    assert lowest(same, 24).all()
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 3.0]), 1).tolist() == [False, False, True, False]
    assert lowest_per_row(same, torch.tensor([0, 3, 8])).sum(1).tolist() == [0, 3, 8]
    assert kept_in_groups(same, Pattern(2, 4)).view(-1, 4).tolist() == [[True, True, False, False]] * 6
