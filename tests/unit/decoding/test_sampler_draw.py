from typing import Any

import pytest
import torch
from statistics_helpers import joint_chi_square

from paceline.server.decoding.noise import gumbel
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import draw, probabilities, sample
from paceline.server.engine.request import SamplingParams

torch.set_num_threads(1)

N_SAMPLES = 200_000


def make_row(position: int = 0, choice: int = 0, **sampling: Any) -> Row:
    return Row(SamplingParams(**sampling), (), (), (), choice, position)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_lowest_of_equal_maxima_wherever_they_are() -> None:
    rows = [make_row(temperature=0.0)] * 64
    for vocab in (5, 64, 1000, 4099):
        scores = torch.zeros(64, vocab)
        first = torch.randint(vocab, (64,), generator=generator())
        for i, at in enumerate(first.tolist()):
            scores[i, torch.randint(at, vocab, (20,), generator=generator(i))] = 7.0
            scores[i, at] = 7.0
        assert draw(scores, rows, generator()).tolist() == first.tolist()


def test_greedy_rows_leave_the_generator_alone() -> None:
    random = generator()
    before = random.get_state()
    draw(torch.randn(3, 5), [make_row(temperature=0.0), make_row(seed=1), make_row(seed=2)], random)
    assert torch.equal(random.get_state(), before)
    draw(torch.randn(1, 5), [make_row()], random)
    assert not torch.equal(random.get_state(), before)


def test_seed_does_not_make_a_greedy_row_random() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.0]]).expand(50, 3)
    rows = [make_row(temperature=0.0, seed=5, position=i) for i in range(50)]
    assert set(draw(scores, rows, generator()).tolist()) == {1}


SCORES = torch.tensor([0.3, -1.0, -torch.inf, 2.0, 0.3, -4.0])


@pytest.mark.parametrize("seeded", [False, True])
def test_draws_follow_the_distribution(seeded: bool) -> None:
    rows = [make_row(position=i, seed=11 if seeded else None) for i in range(N_SAMPLES)]
    tokens = draw(SCORES.expand(N_SAMPLES, -1), rows, generator())
    expected = probabilities(SCORES.unsqueeze(0), [make_row()])[0].double()
    assert joint_chi_square(tokens.bincount(minlength=6), expected / expected.sum()) > 1e-3


@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"seed": 3}, {"temperature": 0.0, "seed": 3}])
def test_reproducible_row_is_the_same_alone_and_in_a_mixed_batch(kind: dict[str, Any]) -> None:
    scores = torch.randn(9, 1003, generator=generator(4))
    crowd = [make_row(position=40 + i, choice=i % 3, **([{}, kind, {"seed": 8}][i % 3])) for i in range(9)]
    together = draw(scores, crowd, generator())
    for i in range(1, 9, 3):
        alone = draw(scores[i : i + 1], [crowd[i]], generator(99))
        assert alone[0] == together[i]


def test_seeded_draw_is_argmax_of_scores_plus_noise() -> None:
    scores = torch.randn(4, 33, generator=generator())
    rows = [make_row(position=i, choice=i, seed=-7) for i in range(4)]
    noise = gumbel([-7] * 4, range(4), range(4), 33, "cpu")
    assert torch.equal(draw(scores, rows, generator()), (scores + noise).argmax(-1))


def test_draw_does_not_modify_scores() -> None:
    scores = torch.randn(3, 5)
    before = scores.clone()
    draw(scores, [make_row(), make_row(seed=1), make_row(temperature=0.0)], generator())
    draw(scores, [make_row()] * 3, generator())
    draw(scores, [make_row(seed=2)] * 3, generator())
    assert torch.equal(scores, before)


def test_probabilities_are_one_hot_for_greedy_rows_only() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [0.0, 0.0, -torch.inf]])
    result = probabilities(scores, [make_row(temperature=0.0), make_row(), make_row(seed=1)])
    assert result[0].tolist() == [0, 1, 0]
    assert torch.equal(result[1:], scores[1:].softmax(-1))
    assert probabilities(scores[:1], [make_row(temperature=0.0)]).tolist() == [[0, 1, 0]]


class _Extremes(torch.Generator):
    """Only a name: ``sample`` gets its uniforms from ``random_uniforms``, which the test replaces."""


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_sample_never_takes_weight_zero_even_at_the_ends(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extreme(shape: tuple[int, ...], _generator: object, _device: object) -> torch.Tensor:
        return torch.full(shape, uniform, dtype=torch.float64)

    monkeypatch.setattr("paceline.server.decoding.sampler.random_uniforms", extreme)
    weights = torch.tensor([[0.0, 0.1, 0.3, 0.7, 0.0], [0.0, 1e-38, 0.0, 3e-38, 0.0]])
    expected = 1 if uniform == 0 else 3
    assert sample(weights, _Extremes()).tolist() == [expected] * 2
