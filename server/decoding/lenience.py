"""Lossy acceptance (DistillSpec, 2310.08461), for requests that ask for it where the model allows it.

Owns the forms of lenience and the greedy rule; the sampled one is ``verify.verify_token`` with these forms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LenienceForm = Literal["exp", "lin", "sq"]


@dataclass(frozen=True, slots=True)
class Lenience:
    """How far acceptance may leave exactness, with e in (0, 1] per block; 1 is exact.

    Sampled: accepted with probability min(1, f(p(y), e) / q(y)), f = p^e ("exp"), p / e ("lin") or p / e^2 ("sq").
    Greedy: accepted if p1(y) >= e max p1, p1 the softmax at temperature 1 after bias, penalties and masks.
    """

    values: Sequence[float]
    form: LenienceForm = "exp"

    def apply(self, p: Tensor) -> Tensor:
        """f(p, e) of the target's probabilities of draft tokens, float64 [B, K]."""
        values = torch.tensor(self.values, dtype=torch.float64, device=p.device).unsqueeze(1)
        return _FORMS[self.form](p, values)


def match_likely(scores: Tensor, drafts: Sequence[int], value: float) -> tuple[int, int]:
    """Greedy verification with lenience: a draft token is accepted if it is at least ``value`` times as likely as the
    likeliest one.

    Args:
        scores: fp32 [K + 1, V], which are the logits of temperature 1 for greedy choices.
        drafts: the K draft tokens.
        value: e in (0, 1].

    Returns:
        How many draft tokens are accepted, and the token after them.
    """
    best = scores.max(dim=1)
    accepted = 0
    while accepted < len(drafts):
        behind = best.values[accepted] - scores[accepted, drafts[accepted]]
        if math.exp(-float(behind)) < value:
            break
        accepted += 1
    return accepted, int(best.indices[accepted])


_FORMS: Mapping[LenienceForm, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": torch.pow,
    "lin": torch.div,
    "sq": lambda p, e: p / e**2,
}
