import math
from itertools import product

import numpy as np
import pytest
import torch
from native_kernels import require_native
from scipy import stats

from paceline.kernels.cpu.library import ISAS, Isa, usable_isas
from paceline.kernels.cpu.library import gumbel as native_gumbel
from paceline.kernels.noise import streams
from paceline.server.decoding.noise import gumbel

torch.set_num_threads(1)

SEEDS = [0, 1, 2, -1, -(2**63), 2**63, 2**64 - 2, 123456789012345678]


def noise(seed: int, choice: int = 0, position: int = 0, vocab_size: int = 50_000) -> torch.Tensor:
    return gumbel([seed], [choice], [position], vocab_size, "cpu")[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_is_gumbel_over_tokens(seed: int) -> None:
    values = noise(seed).double().numpy()
    assert np.isfinite(values).all()
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_is_gumbel_along_every_counter(axis: str) -> None:
    counters = {"seed": [7] * 20_000, "choice": [0] * 20_000, "position": [0] * 20_000}
    counters[axis] = list(range(20_000))
    values = gumbel(counters["seed"], counters["choice"], counters["position"], 3, "cpu").double().numpy()
    for token in range(3):
        assert stats.kstest(values[:, token], stats.gumbel_r.cdf).pvalue > 1e-3
    # Neighbouring counters and neighbouring tokens are uncorrelated.
    assert abs(stats.spearmanr(values[:-1, 0], values[1:, 0]).statistic) < 0.03
    assert abs(stats.spearmanr(values[:, 0], values[:, 1]).statistic) < 0.03


def test_rows_of_different_counters_are_uncorrelated() -> None:
    counters = list(product([0, 1, -1], [0, 1], [0, 1, 2, 100]))
    seeds, choices, positions = zip(*counters, strict=True)
    ranks = gumbel(seeds, choices, positions, 20_000, "cpu").argsort(-1).argsort(-1).double()
    correlation = torch.corrcoef(ranks) - torch.eye(len(counters), dtype=torch.float64)
    # 276 pairs, standard deviation 1 / sqrt(20000) = 0.0071 each.
    assert correlation.abs().max() < 0.032
    lagged = torch.corrcoef(torch.stack([ranks[0, :-1], ranks[0, 1:], ranks[1, :-1], ranks[1, 1:]]))
    assert (lagged - torch.eye(4, dtype=torch.float64)).abs().max() < 0.032


def test_counters_do_not_stand_in_for_each_other() -> None:
    triples = set(product([0, 1, 2, 3], repeat=3))
    firsts = {tuple(noise(*triple)[:2].tolist()) for triple in triples}
    assert len(firsts) == len(triples)


@pytest.mark.parametrize("vocab_size", [1, 7, 1003, 49_153])
def test_row_is_a_pure_function_of_its_own_arguments(vocab_size: int) -> None:
    together = gumbel(SEEDS, range(8), range(100, 108), vocab_size, "cpu")
    assert together.dtype == torch.float32
    for i, seed in enumerate(SEEDS):
        assert torch.equal(noise(seed, i, 100 + i, vocab_size), together[i])
    # A longer vocabulary only adds tokens: a token's noise depends on its own id.
    assert torch.equal(
        gumbel(SEEDS, range(8), range(100, 108), vocab_size + 5, "cpu")[:, :vocab_size], together
    )


def test_values_are_pinned() -> None:
    # Seeds are part of what users rely on from one release to the next.
    expected = torch.tensor(PINNED)
    assert torch.allclose(gumbel([0, -1], [0, 3], [0, 1000], 4, "cpu"), expected, rtol=1e-6, atol=1e-6)


def test_has_fine_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    # The extreme words of the mixer: the smallest and largest uniforms stay strictly inside (0, 1).
    words = torch.tensor([[0, -1, 2**63 - 1, -(2**63)]])
    monkeypatch.setattr("paceline.kernels.noise._mix_", lambda mixed, _: mixed.copy_(words))
    values = streams(torch.zeros(1, dtype=torch.int64), 4)[0]
    lowest, highest = -np.log(53 * np.log(2)), 53 * np.log(2)
    assert values[0].item() == pytest.approx(lowest, rel=1e-6)
    assert values[1].item() == pytest.approx(highest, rel=1e-6)
    assert values[2:].tolist() == pytest.approx([-np.log(np.log(2))] * 2, rel=1e-6)


def test_agrees_with_unsigned_arithmetic_on_python_integers() -> None:
    mask = 2**64 - 1

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    def one(seed: int, choice: int, position: int, token: int) -> float:
        key, gamma = 0, 0x9E3779B97F4A7C15
        for word in (seed, choice, position):
            key = mix((key + gamma & mask) ^ (word & mask))
        uniform = ((mix(key + token * gamma & mask) >> 12) + 0.5) / 2**52
        return -math.log(-math.log(uniform))

    for seed in SEEDS:
        expected = [one(seed, 2, 17, token) for token in range(300)]
        np.testing.assert_allclose(noise(seed, 2, 17, 300).numpy(), expected, rtol=2e-6, atol=2e-7)


PINNED = [
    [0.40234175, -0.71439511, -1.09772265, 0.91632175],
    [-0.40884316, 0.49976960, 2.51172113, -1.26204288],
]


@pytest.mark.parametrize("isa", ISAS)
def test_the_native_kernel_has_the_same_noise(isa: Isa) -> None:
    """The last bit may differ, as logarithms of two libraries do; it hardly ever does. Odd widths reach the tails."""
    require_native()
    if isa not in usable_isas():
        pytest.skip(f"this CPU has no {isa}")
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
    for columns in (1, 7, 8, 300, 20_011):
        found, expected = native_gumbel(keys, columns, isa), streams(keys, columns)
        assert torch.allclose(found, expected, rtol=2.4e-7, atol=1e-9)
        assert (found != expected).float().mean() < 1e-3


def test_seeded_rows_take_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    taken: list[int] = []

    def recording(keys: torch.Tensor, columns: int) -> torch.Tensor:
        taken.append(columns)
        return native_gumbel(keys, columns)

    monkeypatch.setattr("paceline.server.decoding.noise.native_gumbel", recording)
    native = gumbel([5], [0], [7], 50, "cpu")
    assert taken == [50]
    monkeypatch.setattr("paceline.server.decoding.noise.available", lambda: False)
    assert torch.allclose(gumbel([5], [0], [7], 50, "cpu"), native, rtol=2.4e-7)
    assert taken == [50]
