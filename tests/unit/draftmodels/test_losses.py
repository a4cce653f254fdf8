"""Losses against plain float64 formulas, their gradients, and what they promise about acceptance."""

import math

import pytest
import torch
from torch import Tensor

from paceline.draftmodels.losses import (
    LOSSES,
    HybridLK,
    JensenShannon,
    acceptance,
    cross_entropy,
    forward_kl,
    reverse_kl,
    top_k_buckets,
    total_variation,
)


def pair(rows: int = 6, vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64) * 2
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def plain(name: str, p: list[float], q: list[float]) -> float:
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    alpha = sum(min(x, y) for x, y in zip(p, q, strict=True))
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    lam = math.exp(-3 * alpha)
    values: dict[str, float] = {
        "fkl": kl(p, q),
        "rkl": kl(q, p),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "tvd": sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "lk": -math.log(alpha),
        "lk-hybrid": lam * kl(p, q) + (1 - lam) * (1 - alpha),
    }
    return values[name]


@pytest.mark.parametrize("name", LOSSES)
def test_values_equal_the_formulas(name: str) -> None:
    log_p, log_q = pair()
    values = LOSSES[name](log_p, log_q)
    assert values.shape == (6,)
    for value, p, q in zip(values.tolist(), log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        assert value == pytest.approx(plain(name, p, q), abs=1e-12)
    assert values.min() > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_losses_vanish_at_equality_only(name: str) -> None:
    log_p, log_q = pair()
    torch.testing.assert_close(
        LOSSES[name](log_p, log_p), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert (LOSSES[name](log_p, log_q) > 0).all()


@pytest.mark.parametrize("name", [*LOSSES, "jsd 0.1", "jsd 0.9"])
def test_gradients_equal_finite_differences(name: str) -> None:
    loss = JensenShannon(float(name.split()[1])) if " " in name else LOSSES[name]
    log_p, log_q = pair(rows=3, vocab=7)
    logits = log_q.clone().requires_grad_()
    if name == "lk-hybrid":  # lam is a constant for the gradient, which finite differences do not know
        lam = torch.exp(-3 * acceptance(log_p, log_q))
        (expected,) = torch.autograd.grad(
            (
                lam * forward_kl(log_p, logits.log_softmax(-1))
                + (1 - lam) * total_variation(log_p, logits.log_softmax(-1))
            ).sum(),
            logits,
        )
        (got,) = torch.autograd.grad(HybridLK()(log_p, logits.log_softmax(-1)).sum(), logits)
        torch.testing.assert_close(got, expected)
        return
    assert torch.autograd.gradcheck(lambda x: loss(log_p, x.log_softmax(-1)), logits)


def test_jsd_ends_are_the_two_kls_and_the_inside_approaches_them() -> None:
    log_p, log_q = pair()
    assert torch.equal(JensenShannon(0.0)(log_p, log_q), forward_kl(log_p, log_q))
    assert torch.equal(JensenShannon(1.0)(log_p, log_q), reverse_kl(log_p, log_q))
    for beta, end in ((1e-8, forward_kl), (1 - 1e-8, reverse_kl)):
        slope = JensenShannon(beta)(log_p, log_q) / min(beta, 1 - beta)
        torch.testing.assert_close(slope, end(log_p, log_q), rtol=2e-2, atol=2e-2)


def test_tokens_without_mass_cost_nothing_and_give_no_nan() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.5, 0.25]]).log().requires_grad_()
    for name in ("fkl", "jsd", "tvd", "lk", "lk-hybrid"):
        value = LOSSES[name](log_p, log_q)
        (gradient,) = torch.autograd.grad(value.sum(), log_q)
        assert value.isfinite().all(), name
        assert gradient.isfinite().all(), name


def test_cross_entropy_is_the_likelihood_of_the_labels() -> None:
    _, log_q = pair()
    labels = torch.arange(6)
    torch.testing.assert_close(cross_entropy(log_q, labels), -log_q[torch.arange(6), labels])


@pytest.mark.parametrize("k", [1, 3, 11])
def test_buckets_keep_all_mass_and_bias_losses_low(k: int) -> None:
    log_p, log_q = pair()
    top = log_p.topk(k)
    small_p, small_q = top_k_buckets(log_q, top.indices, top.values)
    for small in (small_p, small_q):
        torch.testing.assert_close(small.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    for name in ("fkl", "rkl", "jsd", "tvd"):
        low, full = LOSSES[name](small_p, small_q), LOSSES[name](log_p, log_q)
        assert (low <= full + 1e-9).all(), name
        if k == 11:
            torch.testing.assert_close(low, full)
