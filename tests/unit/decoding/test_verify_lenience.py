"""Lenience: more is accepted, by the formula asked for; at e = 1, and for seeded choices, nothing changes."""

import math
from typing import Any

import pytest
import torch

from paceline.server.decoding.lenience import Lenience, LenienceForm, match_likely
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import process
from paceline.server.decoding.verify import (
    DraftBlock,
    Rule,
    Verdict,
    token_acceptance,
    verify,
    verify_token,
)
from paceline.server.engine.request import SamplingParams

VOCAB = 12
FORMS: dict[LenienceForm, Any] = {
    "exp": lambda p, e: p**e,
    "lin": lambda p, e: p / e,
    "sq": lambda p, e: p / e**2,
}


def distributions(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5).softmax(-1)


def batch(blocks: int = 40, length: int = 3) -> tuple[torch.Tensor, list[Row], list[DraftBlock]]:
    """Scores, rows and blocks of sampled choices, with a draft unlike the target."""
    q = distributions(blocks, length, seed=1)
    drafts = torch.multinomial(q.flatten(0, 1), 1, generator=torch.Generator().manual_seed(2))
    tokens = drafts.view(blocks, length).tolist()
    logits = distributions(blocks * (length + 1), seed=3).log()
    rows = [
        Row(SamplingParams(temperature=1.0), (1,), tuple(tokens[b][:j]), (), 0, 1 + j)
        for b in range(blocks)
        for j in range(length + 1)
    ]
    return process(logits, rows), rows, [DraftBlock(tuple(t), q[b]) for b, t in enumerate(tokens)]


def verdicts(rule: Rule, lenience: Lenience | None, seed: int = 4) -> list[Verdict]:
    scores, rows, blocks = batch()
    return verify(scores, rows, blocks, rule, torch.Generator().manual_seed(seed), lenience)


@pytest.mark.parametrize("form", FORMS)
def test_acceptance_follows_the_formula(form: LenienceForm) -> None:
    blocks = 40
    p, q = distributions(blocks, 4, seed=5), distributions(blocks, 3, seed=6)
    drafts = torch.randint(VOCAB, (blocks, 3), generator=torch.Generator().manual_seed(7))
    values = [0.8 if b % 2 else 0.95 for b in range(blocks)]
    got = token_acceptance(p, q, drafts, Lenience(values, form))
    exact = token_acceptance(p, q, drafts)
    for b, e in enumerate(values):
        for i in range(3):
            token = drafts[b, i]
            expected = min(1.0, FORMS[form](float(p[b, i, token]), e) / float(q[b, i, token]))
            assert float(got[b, i]) == pytest.approx(expected, rel=1e-5)
            assert got[b, i] >= exact[b, i]
    assert ((exact < got) & (got < 1)).sum() > blocks // 2


def test_what_the_target_excludes_is_never_accepted() -> None:
    p, q = torch.zeros(1, 2, VOCAB), distributions(1, 1)
    p[..., 3] = 1.0
    for form in FORMS:
        assert token_acceptance(p, q, torch.tensor([[5]]), Lenience([0.1], form)) == 0


def test_the_recovered_token_comes_from_the_residual_of_p() -> None:
    """Not from that of f(p), whose tail is fat."""
    p, q = distributions(1, 2, seed=8), distributions(1, 1, seed=9)
    draft = (q - p[:, :1]).argmax(-1)
    _, following = verify_token(
        p, q, draft, torch.tensor([1]), torch.ones(1, 1, dtype=torch.float64), Lenience([0.999])
    )
    residual = (p[0, 0] - q[0, 0]).clamp(min=0)
    assert torch.allclose(following[0], residual / residual.sum())


@pytest.mark.parametrize("rule", ["token", "block"])
def test_one_is_exact_under_either_rule(rule: Rule) -> None:
    assert verdicts(rule, Lenience([1.0] * 40)) == verdicts(rule, None)


def test_lenience_forces_the_token_rule() -> None:
    lenience = Lenience([0.6] * 40)
    assert verdicts("block", lenience) == verdicts("token", lenience)
    assert verdicts("block", None) != verdicts("token", None)


@pytest.mark.parametrize("form", FORMS)
def test_the_lower_the_more_is_accepted(form: LenienceForm) -> None:
    accepted = [
        sum(v.accepted for v in verdicts("token", Lenience([e] * 40, form))) for e in (1.0, 0.7, 0.3, 0.05)
    ]
    assert accepted == sorted(accepted)
    assert accepted[0] + 20 < accepted[-1]


def test_only_the_blocks_that_ask_for_it_are_lenient() -> None:
    scores, rows, blocks = batch()
    some = Lenience([0.02 if b % 2 else 1.0 for b in range(40)])
    got = verify(scores, rows, blocks, "token", torch.Generator().manual_seed(4), some)
    everywhere = verdicts("token", Lenience([0.02] * 40))
    assert sum(v.accepted for v in got[1::2]) > 1.5 * sum(v.accepted for v in got[0::2])
    assert sum(v.accepted for v in got[0::2]) < sum(v.accepted for v in everywhere[0::2])


def test_greedy_accepts_what_is_nearly_as_likely_as_the_best() -> None:
    scores = torch.full((4, VOCAB), -9.0)
    scores[:, 0] = 0.0
    scores[0, 4], scores[1, 5], scores[2, 6] = math.log(0.8), math.log(0.5), math.log(0.3)
    for value, accepted in {0.9: 0, 0.6: 1, 0.4: 2, 0.2: 3}.items():
        assert match_likely(scores, [(4, 5, 6)], [value]) == [(accepted, 0)]
    several = torch.cat([scores, scores[:3], scores[:1]])
    assert match_likely(several, [(4, 5, 6), (0, 4), ()], [0.4, 1.0, 0.1]) == [(2, 0), (1, 0), (0, 0)]
    scores[0, 4] = -math.inf
    assert match_likely(scores[:2], [(4,)], [1e-9]) == [(0, 0)]


def test_greedy_and_seeded_blocks_in_one_batch() -> None:
    """Greedy choices take the temperature-1 rule; seeded ones stay exact, lenience or not."""
    scores, rows, blocks = batch(blocks=30)
    greedy, seeded = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=3)
    for b in range(30):
        for row in rows[4 * b : 4 * b + 4]:
            row.sampling = greedy if b % 2 else seeded

    def accepted(value: float) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        got = verify(scores, rows, blocks, "token", generator, Lenience([value] * 30))
        return [v.accepted for v in got]

    exact, lenient = accepted(1.0), accepted(0.3)
    assert lenient[0::2] == exact[0::2]
    assert sum(lenient[1::2]) > sum(exact[1::2])
