"""Costs are learnt from noisy steps, widths not seen yet are predicted, and a stalled step is not believed."""

import random

import pytest

from paceline.server.decoding.policy import StepWork
from paceline.server.decoding.policy.costs import StepCosts


def target(rows: int, context: int) -> float:
    return 0.010 + 0.0004 * rows + 2e-7 * rows * context + (0.003 if rows > 8 else 0.0)


def draft(forwards: int, rows: int) -> float:
    return 0.002 * forwards + 0.0001 * rows


def step(rows: int, context: int, forwards: int = 0, *, slow: float = 1.0, catch_up: int = 0) -> StepWork:
    draft_rows = forwards + catch_up
    return StepWork(
        rows=rows,
        row_context=rows * context,
        decodes_only=True,
        target_seconds=target(rows, context) * slow,
        draft_forwards=forwards,
        draft_rows=draft_rows,
        draft_row_context=draft_rows * context,
        catch_up_rows=catch_up,
        draft_seconds=draft(forwards, forwards) * slow + 0.0005 * catch_up,
    )


def seconds_of(costs: StepCosts, rows: int, context: int) -> float:
    """Of a step among those that ``step`` makes: most of them follow one that drafted."""
    return costs.target_seconds(rows, context, drafting=True)


def learnt(widths: range, steps: int = 400) -> StepCosts:
    rng, costs = random.Random(3), StepCosts()
    for i in range(steps):
        rows = rng.choice(widths)
        costs.observe(step(rows, 500 + i, rows - 1, slow=rng.uniform(0.9, 1.1)))
    return costs


def test_known_and_unknown_widths_are_predicted() -> None:
    costs = learnt(range(1, 7))
    for rows in range(1, 7):
        assert seconds_of(costs, rows, 900) == pytest.approx(target(rows, 900), rel=0.07)
    assert seconds_of(costs, 8, 900) == pytest.approx(target(8, 900), rel=0.1)
    for forwards in range(1, 6):
        assert costs.draft_seconds(forwards, forwards, 900) == pytest.approx(
            draft(forwards, forwards), rel=0.1
        )


def test_a_bucket_knows_the_step_that_the_line_cannot_have() -> None:
    costs = learnt(range(7, 11))
    wide = seconds_of(costs, 9, 800) - seconds_of(costs, 8, 800)
    assert wide > 0.002
    assert seconds_of(costs, 8, 800) == pytest.approx(target(8, 800), rel=0.07)


def test_one_stalled_step_changes_little_and_a_lasting_change_is_followed() -> None:
    costs = learnt(range(1, 4))
    before = seconds_of(costs, 2, 900)
    costs.observe(step(2, 900, 1, slow=1000.0))
    assert seconds_of(costs, 2, 900) < 1.3 * before
    for _ in range(200):
        for rows in (1, 2, 3):
            costs.observe(step(rows, 900, rows - 1, slow=4.0))
    assert seconds_of(costs, 2, 900) == pytest.approx(4 * target(2, 900), rel=0.1)


def plain(rows: int, seconds: float) -> StepWork:
    """A step without a draft model."""
    return StepWork(rows=rows, row_context=rows * 100, decodes_only=True, target_seconds=seconds)


@pytest.mark.parametrize("slow", [1.0, 1.5])
def test_what_a_single_row_costs_is_remembered_while_only_blocks_run(slow: float) -> None:
    """A row more costs 2% on the line's typical shape and 20% here; drafting all the time must not blur that."""

    def seconds(rows: int) -> float:
        return (0.010 if rows == 1 else 0.012 + 0.0001 * rows) * rng.uniform(0.95, 1.05)

    rng, costs = random.Random(5), StepCosts()
    for rows in rng.choices((1, 2, 3), k=200):
        costs.observe(plain(rows, seconds(rows)))
    for rows in rng.choices((2, 3), k=400):
        costs.observe(plain(rows, slow * seconds(rows)))
    single = costs.target_seconds(1, 100, drafting=False)
    assert single == pytest.approx(0.010 * slow, rel=0.05 if slow == 1 else 0.12)


def test_steps_among_drafting_ones_have_a_price_of_their_own() -> None:
    """What a draft model evicts from the caches is paid by the target; a step between two plain ones is cheaper."""
    costs, after = StepCosts(), 0
    for i in range(400):
        drafts = i // 4 % 2
        costs.observe(
            StepWork(
                rows=1 + drafts,
                row_context=100,
                decodes_only=True,
                target_seconds=0.0043 + 0.0004 * drafts + 0.0008 * after,
                draft_forwards=drafts,
                draft_rows=drafts,
                draft_seconds=0.001 * drafts,
            )
        )
        after = drafts
    assert costs.target_seconds(1, 100, drafting=False) == pytest.approx(0.0043, rel=0.03)
    assert costs.target_seconds(2, 100, drafting=True) == pytest.approx(0.0055, rel=0.03)


def test_prompts_beside_the_decodes_teach_nothing_about_verification() -> None:
    costs = learnt(range(1, 4))
    before = seconds_of(costs, 2, 900)
    costs.observe(StepWork(rows=514, row_context=0, decodes_only=False, target_seconds=9.0))
    assert seconds_of(costs, 2, 900) == before


def test_catching_up_has_a_price_of_its_own() -> None:
    costs = learnt(range(2, 4))
    before = costs.draft_seconds(2, 2, 900)
    for _ in range(5):
        costs.observe(step(3, 900, 2, catch_up=300))
    assert costs.draft_seconds(2, 2, 900) == before
    assert costs.catch_up_seconds(1000) == pytest.approx(0.5, rel=0.1)


def test_nothing_measured_costs_nothing() -> None:
    costs = StepCosts()
    assert (seconds_of(costs, 3, 9), costs.draft_seconds(2, 2, 9), costs.catch_up_seconds(99)) == (0, 0, 0)
