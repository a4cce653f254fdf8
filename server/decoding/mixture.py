"""How a steered model's logits are made up: pairs of experts and anti-experts as one row of weights per sequence.

Proxy-tuning (2401.08565), emulated fine-tuning (2310.12962) and guidance (2306.17806) all are ``sum_i w_i s_i`` over
members, the base first. The arithmetic itself is in ``arithmetic``; this knows no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["proxy", "amplify", "cfg"]
Support = Literal["full", "top_p", "expert_top_p"]
#: Index of the base among the members.
BASE = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of a steered model, s_M being the base's logits and x the pair's strength.

    Attributes:
        name: what requests call it.
        mode: proxy: s_M + x (s_E - s_A); amplify: s_E + x (s_M - s_A); cfg: s_M + x (s_M - s_A).
        expert: index of E among the members; None in mode cfg.
        anti_expert: index of A.
        strength: x where a request says nothing.
        limits: least and greatest strength that requests may ask for.
        support: tokens that may come out while the pair is on: all, the nucleus of the combined distribution, or the
            nucleus of the expert's.
        top_p: mass of that nucleus.
    """

    name: str
    mode: Mode
    expert: int | None
    anti_expert: int
    strength: float
    limits: tuple[float, float]
    support: Support = "full"
    top_p: float = 1.0

    @property
    def parameter(self) -> Literal["alpha", "beta"]:
        """What the strength is called."""
        return "beta" if self.mode == "amplify" else "alpha"

    def is_on(self, strength: float | None) -> bool:
        """Whether the pair changes anything: None is off, and so is an alpha of 0."""
        return strength is not None and (self.mode == "amplify" or strength != 0)

    def weights(self, strength: float) -> list[tuple[int, float]]:
        """What is added to the weights of the members, which are 1 for the base and 0 for the others."""
        if self.mode == "cfg":
            return [(BASE, strength), (self.anti_expert, -strength)]
        assert self.expert is not None
        if self.mode == "proxy":
            return [(self.expert, strength), (self.anti_expert, -strength)]
        return [(BASE, strength - 1), (self.expert, 1.0), (self.anti_expert, -strength)]


@dataclass(frozen=True, slots=True)
class Mixture:
    """How one sequence's logits are combined.

    Attributes:
        weights: one per member.
        nuclei: restrictions of the support: (member whose nucleus it is, None for the combination's; its mass).
    """

    weights: tuple[float, ...]
    nuclei: tuple[tuple[int | None, float], ...] = ()

    @property
    def members(self) -> tuple[int, ...]:
        """Members beside the base that must run."""
        named = {m for m, _ in self.nuclei if m is not None} - {BASE}
        return tuple(m for m, w in enumerate(self.weights) if m != BASE and (w != 0 or m in named))


def mixture(pairs: Sequence[Pair], strengths: Mapping[str, float | None], num_members: int) -> Mixture | None:
    """The mixture of one sequence; None if it is exactly the base.

    Args:
        strengths: by pair, in place of the pairs' own; None switches a pair off.
    """
    weights = [1.0] + [0.0] * (num_members - 1)
    nuclei: list[tuple[int | None, float]] = []
    for pair in pairs:
        strength = strengths.get(pair.name, pair.strength)
        if strength is None or not pair.is_on(strength):
            continue
        for member, weight in pair.weights(strength):
            weights[member] += weight
        if pair.support != "full":
            nuclei.append((pair.expert if pair.support == "expert_top_p" else None, pair.top_p))
    made = Mixture(tuple(weights), tuple(nuclei))
    return made if made.members or made.weights[BASE] != 1 or nuclei else None
