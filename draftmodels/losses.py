"""Distances between target and draft distributions, as pure functions of log-probabilities.

Notation of DistillSpec (2310.08461): p is the target's distribution, q the draft's. Every loss takes log p and log q,
fp32 [rows, categories], both normalised over the last dimension, and returns one value per row, [rows], in nats where
it is an entropy. Gradients flow through log q only. Categories are the vocabulary, or the target's top-k tokens plus
one bucket for the rest (``top_k_buckets``). Knows nothing of models, batches or reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def _expectation(log_weights: Tensor, values: Tensor) -> Tensor:
    """sum exp(log_weights) * values, with 0 * inf = 0 (categories of no mass)."""
    weights = log_weights.exp()
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): mode-covering, the usual distillation loss."""
    return _expectation(log_p, log_p - log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p): mode-seeking."""
    return _expectation(log_q, log_q - log_p)


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (DistillSpec, generalised JSD).

    At the ends it vanishes with slope KL(p || q) (beta -> 0) and KL(q || p) (beta -> 1); there these are returned.
    """

    beta: float = 0.5

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """See the class."""
        if self.beta == 0:
            return forward_kl(log_p, log_q)
        if self.beta == 1:
            return reverse_kl(log_p, log_q)
        beta = torch.tensor(self.beta, dtype=log_p.dtype, device=log_p.device)
        log_m = torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))
        return beta * _expectation(log_p, log_p - log_m) + (1 - beta) * _expectation(log_q, log_q - log_m)


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """alpha = sum min(p, q): the probability that speculative sampling accepts a token drawn from q."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - alpha: the acceptance itself, but its gradient vanishes far from the target."""
    return 1 - acceptance(log_p, log_q)


def log_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log alpha (LK, 2602.23881): total variation with a gradient that does not vanish at a bad start."""
    return -torch.logsumexp(torch.minimum(log_p, log_q), -1)


@dataclass(frozen=True)
class HybridLK:
    """lam KL(p || q) + (1 - lam) TVD, lam = exp(-eta alpha) without gradient (LK, 2602.23881)."""

    eta: float = 3.0

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """See the class."""
        lam = torch.exp(-self.eta * acceptance(log_p, log_q).detach())
        return lam * forward_kl(log_p, log_q) + (1 - lam) * total_variation(log_p, log_q)


def cross_entropy(log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q(label): labels int64 [rows]. With the target's own samples as labels it is SeqKD."""
    return F.nll_loss(log_q, labels, reduction="none")


def top_k_buckets(log_q: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions over the target's top-k tokens and one bucket for everything else.

    The bucket carries the exact remaining mass of each, so totals are exact; what is lost is how q spreads inside it.
    Merging categories never increases a divergence: losses are biased low, by what the tails differ within the bucket.

    Args:
        log_q: draft, [rows, vocab].
        ids: the target's most likely tokens, int64 [rows, k].
        log_p: their log-probabilities, [rows, k].

    Returns:
        (log_p, log_q), each [rows, k + 1].
    """
    chosen = log_q.gather(-1, ids)
    return _with_rest(log_p), _with_rest(chosen)


def _with_rest(log_probs: Tensor) -> Tensor:
    floor = torch.finfo(log_probs.dtype).tiny
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=floor)
    return torch.cat((log_probs, rest.log()), -1)


#: By the names that recipes use.
LOSSES: dict[str, Loss] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": JensenShannon(),
    "tvd": total_variation,
    "lk": log_acceptance,
    "lk-hybrid": HybridLK(),
}
