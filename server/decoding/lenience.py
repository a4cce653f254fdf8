"""Lossy acceptance (DistillSpec, 2310.08461), for requests that ask for it where the model allows it.

Owns the forms of lenience and the greedy rule; the sampled one is ``verify.verify_token`` with these forms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
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


def match_likely(
    scores: Tensor, drafts: Sequence[Sequence[int]], values: Sequence[float]
) -> list[tuple[int, int]]:
    """Greedy verification with lenience: a draft token is accepted if it is at least e times as likely as the likeliest
    one.

    Args:
        scores: fp32 [sum of K + 1, V], block after block, which are the logits of temperature 1 for greedy choices.
        drafts: the K draft tokens of each block.
        values: e in (0, 1] of each block.

    Returns:
        Per block, how many draft tokens are accepted, and the token after them.
    """
    best = scores.max(dim=1)
    padded = torch.tensor([token for block in drafts for token in (*block, 0)], device=scores.device)
    behind = best.values - scores.gather(1, padded.unsqueeze(1)).squeeze(1)
    likelihoods, tokens = iter((-behind).exp().tolist()), iter(best.indices.tolist())
    verdicts = []
    for block, value in zip(drafts, values, strict=True):
        ratios = list(islice(likelihoods, len(block) + 1))
        following = list(islice(tokens, len(block) + 1))
        accepted = next((i for i in range(len(block)) if ratios[i] < value), len(block))
        verdicts.append((accepted, following[accepted]))
    return verdicts


_FORMS: Mapping[LenienceForm, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": torch.pow,
    "lin": torch.div,
    "sq": lambda p, e: p / e**2,
}
