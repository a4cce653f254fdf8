"""The draft length that pays at a batch size, from measured steps, and the schedule made of them."""

import pytest

from paceline.server.backends.vllm.lengths import (
    StepSeconds,
    alphas_of,
    best_length,
    schedule,
    tokens_per_block,
)
from paceline.server.config.vllm import read_schedule

ALPHAS = [0.6, 0.5, 0.4]


def test_tokens_of_a_block() -> None:
    assert tokens_per_block(ALPHAS, 0) == 1
    assert tokens_per_block(ALPHAS, 3) == pytest.approx(1 + 0.6 + 0.3 + 0.12)


def test_acceptance_is_per_position_that_was_examined() -> None:
    assert alphas_of([0, 0, 1, 3, 3, 2], 3) == [4 / 6, 3 / 4, 2 / 3]
    assert alphas_of([0, 0], 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("longest", "length"),
    [
        (1.0, 3),  # drafting is free
        (1.6, 2),  # 2.02 / 1.6 = 1.26, 1.9 / 1.4 = 1.36, 1.6 / 1.2 = 1.33
        (2.5, 1),  # 2.02 / 2.5, 1.9 / 2, 1.6 / 1.5 = 1.07
        (2.7, 0),  # 1.6 / 1.57 = 1.02: within the noise
    ],
)
def test_the_length_with_most_tokens_per_second(longest: float, length: int) -> None:
    assert best_length(StepSeconds(1.0, longest), ALPHAS) == length
    assert best_length(StepSeconds(0.01, 0.01 * longest), ALPHAS) == length


def test_equal_lengths_become_one_range_that_the_configuration_reads() -> None:
    measured = {1: 1.0, 2: 1.1, 4: 1.6, 8: 2.5, 16: 3.0, 32: 4.0}
    found = schedule({size: StepSeconds(1.0, longest) for size, longest in measured.items()}, ALPHAS)
    assert found == ["2:3", "4:2", "8:1", "0"]
    assert [length for *_, length in read_schedule(found, 3, "here")] == [3, 2, 1, 0]
    assert schedule({1: StepSeconds(1.0, 1.0)}, ALPHAS) == ["3"]
