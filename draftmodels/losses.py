"""Distances between target and draft distributions, as pure functions of log-probabilities.

Notation of DistillSpec (2310.08461): p is the target's distribution, q the draft's. Every loss takes log p and log q,
fp32 [rows, categories], and returns one value per row, [rows], in nats where it is an entropy. Gradients flow through
log q only. Categories are the vocabulary, or the target's top-k tokens plus one bucket for the rest
(``top_k_buckets``). ``square_head`` compares hidden states instead. Knows nothing of models, batches or reduction.

q is normalised over the last dimension. p may be a sub-distribution: the part of the target on the ids that a draft of
a restricted vocabulary proposes, of mass m <= 1, with q = 0 on all others. RKL, TVD, LK and acceptance are then those
of the full vocabulary exactly; JSD lacks the constant beta (1 - m) log(1/beta); FKL, infinite over the full vocabulary,
is
the sum over the proposed ids: least at q = p / m, where it is m log m <= 0. Gradients are right for all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.server.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
#: What SquareHead adds to a layer's mean square (2310.06927).
SQUARE_HEAD_EPS = 2.0**-7


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


def square_head(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    rows: int | None = None,
    mean_squares: Tensor | None = None,
) -> Tensor:
    """SquareHead (2310.06927) per layer, mean((H_s - H_t)^2) / (mean(H_t^2) + 2^-7), [layers]; their sum is the loss.

    Args:
        student, teacher: for each block its output, the last one after the final norm; [rows, hidden], all positions
            that are not padding, of prompt and answer alike. The embedding's output is not among them.
        rows: of the whole batch, where these are a part of it; parts then sum to what the whole batch gives.
        mean_squares: mean(H_t^2) of each layer over the whole batch, [layers]; None takes the rows given.
    """
    errors = torch.stack([(s - t).square().mean() for s, t in zip(student, teacher, strict=True)])
    if mean_squares is None:
        mean_squares = torch.stack([t.square().mean() for t in teacher])
    share = 1.0 if rows is None else len(student[0]) / rows
    return errors * share / (mean_squares.to(errors) + SQUARE_HEAD_EPS)


def interpolate(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """TAID's intermediate teacher (2501.16937): softmax of (1 - share) log q + share log p, q without gradient.

    Keeps the mass of a sub-distribution. Interpolating log-probabilities or logits is the same, as both normalise.
    """
    mixed = (1 - share) * log_q.detach() + share * log_p
    return mixed.log_softmax(-1) + log_p.logsumexp(-1, keepdim=True)


def top_k_buckets(
    log_q: Tensor, ids: Tensor, log_p: Tensor, log_rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both distributions over the target's top-k tokens and one bucket for everything else.

    The bucket carries the exact remaining mass of each, so totals are exact; what is lost is how q spreads inside it.
    Merging categories never increases a divergence: losses are biased low, by what the tails differ within the bucket.

    Args:
        log_q: draft, [rows, vocab].
        ids: the target's most likely tokens, int64 [rows, k].
        log_p: their log-probabilities, [rows, k].
        log_rest: log of the target's mass on the other ids of log_q, [rows]; None: all that is missing to 1.

    Returns:
        (log_p, log_q), each [rows, k + 1].
    """
    chosen = log_q.gather(-1, ids)
    whole = _with_rest(log_p) if log_rest is None else torch.cat((log_p, log_rest[:, None]), -1)
    return whole, _with_rest(chosen)


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


def loss_named(name: str) -> Loss:
    """A loss by its name in recipes: a key of ``LOSSES`` or ``jsd:BETA``.

    Raises:
        ConfigError: no such loss, or beta outside 0 to 1.
    """
    if name in LOSSES:
        return LOSSES[name]
    kind, _, text = name.partition(":")
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if kind == "jsd" and 0 <= beta <= 1:
        return JensenShannon(beta)
    raise ConfigError(f'expected {", ".join(LOSSES)}, "jsd:BETA" with BETA from 0 to 1 or "ce", got "{name}"')
