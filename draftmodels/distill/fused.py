"""Losses with their gradients in closed form, for the dense teacher: what most of a training step's memory traffic is.

Autograd over ``losses`` writes some 25 buffers of [rows, vocabulary] per chunk; written out, each distribution is made
once and about half of the passes go. ``losses`` is the oracle: the two are compared for every loss in the tests. Every
function takes ``Pair`` and returns (loss per row [rows], gradient on log q [rows, vocabulary]); log q counts as free
there, ``value_and_gradient`` takes it through the softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.losses import LOSSES, HybridLK, JensenShannon, loss_named

#: Below any log-probability that matters: 0 * log 0 must be 0.
_FLOOR = -1e4


@dataclass(frozen=True, slots=True)
class Pair:
    """Target and draft, fp32 [rows, vocabulary] each; p may be a sub-distribution."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor
    alpha: Tensor  # [rows], sum of min(p, q)


_Result = tuple[Tensor, Tensor]


def value_and_gradient(name: str, log_p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [rows], alpha [rows], gradient of each row's loss on its logits [rows, vocabulary]).

    Args:
        name: a loss of ``losses.loss_named``.
        log_p: target, [rows, vocabulary], any float type.
        logits: draft, divided by the temperature, fp32 [rows, vocabulary].
    """
    pair = _pair(log_p, logits)
    loss, gradient = _function(name)(pair)
    # Through the softmax: d logits = g - q * sum(g).
    total = gradient.sum(-1, keepdim=True)
    return loss, pair.alpha, gradient.addcmul_(pair.q, total, value=-1)


def label_value_and_gradient(log_p: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for cross entropy with ``labels``, int64 [rows]; rows with label -1 have loss and gradient 0."""
    pair = _pair(log_p, logits)
    index, has = labels.clamp(min=0)[:, None], (labels >= 0)[:, None]
    loss = -(pair.log_q.gather(-1, index) * has).squeeze(-1)
    gradient = pair.q * has
    return loss, pair.alpha, gradient.scatter_add_(-1, index, -has.to(gradient.dtype))


def _pair(log_p: Tensor, logits: Tensor) -> Pair:
    log_p = log_p.to(torch.float32, copy=True).clamp_(min=_FLOOR)
    log_q = logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return Pair(log_p, p, log_q, q, torch.minimum(p, q).sum(-1))


def _forward_kl(x: Pair) -> _Result:
    return ((x.log_p - x.log_q).mul_(x.p)).sum(-1), -x.p


def _reverse_kl(x: Pair) -> _Result:
    terms = (x.log_q - x.log_p).mul_(x.q)
    return terms.sum(-1), terms  # plus q, which the softmax takes away


def _total_variation(x: Pair) -> _Result:
    return 1 - x.alpha, torch.where(x.q < x.p, -x.q, 0.0)


def _log_acceptance(x: Pair) -> _Result:
    return -x.alpha.log(), torch.where(x.q < x.p, -x.q / x.alpha[:, None], 0.0)


def _jensen_shannon(beta: float) -> Callable[[Pair], _Result]:
    def both(x: Pair) -> _Result:
        log_m = (x.p * beta).add_(x.q, alpha=1 - beta).clamp_(min=torch.finfo(torch.float32).tiny).log_()
        gradient = (x.log_q - log_m).mul_(x.q).mul_(1 - beta)
        loss = (x.log_p - log_m).mul_(x.p).sum(-1).mul_(beta) + gradient.sum(-1)
        return loss, gradient

    return {0.0: _forward_kl, 1.0: _reverse_kl}.get(beta, both)


def _hybrid(eta: float) -> Callable[[Pair], _Result]:
    def both(x: Pair) -> _Result:
        lam = torch.exp(-eta * x.alpha)
        (kl, kl_gradient), (tvd, tvd_gradient) = _forward_kl(x), _total_variation(x)
        gradient = kl_gradient.mul_(lam[:, None]).add_(tvd_gradient.mul_(1 - lam[:, None]))
        return lam * kl + (1 - lam) * tvd, gradient

    return both


_FUNCTIONS: dict[str, Callable[[Pair], _Result]] = {
    "fkl": _forward_kl,
    "rkl": _reverse_kl,
    "tvd": _total_variation,
    "lk": _log_acceptance,
}


def _function(name: str) -> Callable[[Pair], _Result]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    loss = loss_named(name)
    if isinstance(loss, JensenShannon):
        return _jensen_shannon(loss.beta)
    assert isinstance(loss, HybridLK), f"{name} has no closed form here; known: {', '.join(LOSSES)}"
    return _hybrid(loss.eta)
