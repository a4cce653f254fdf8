"""The sampled rules by simulation, and the proof that the check notices wrong ones.

A *chain* stands for target and draft: next-token distributions per state, a state after each token. The
simulation drafts, verifies and commits round after round until every sample has three tokens, whose joint
distribution is tested against the target's. Mutants break one thing each, and must be rejected.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from statistics_helpers import joint_chi_square, joint_counts, joint_probabilities
from torch import Tensor

from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import probabilities, process
from paceline.server.decoding.verify import (
    DraftBlock,
    verify,
    verify_block,
    verify_token,
)
from paceline.server.engine.request import SamplingParams

torch.set_num_threads(1)

RuleFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
RULES: dict[str, RuleFunction] = {"token": verify_token, "block": verify_block}

DEPTH = 3
VOCAB = 5
N_SAMPLES = 200_000
PASSES = 1e-3
REJECTED = 1e-12


@dataclass(frozen=True)
class Chain:
    """Target and draft as state machines: [S, V] each.

    ``declared`` is the q that verification is told. ``stale`` gives every position of a block the target's
    distribution at the block's start.
    """

    after: Tensor
    target: Tensor
    draft: Tensor
    declared: Tensor
    stale: bool = False
    start: int = 0

    def joint(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        def next_probs(prefix: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
            state = self.start
            for token in prefix:
                state = int(self.after[state, token])
            return np.asarray(self.target[state].double().numpy())

        return joint_probabilities(next_probs, VOCAB, DEPTH)


def warped(logits: Tensor, **sampling: Any) -> Tensor:
    rows = [Row(SamplingParams(**sampling), (), (), (), 0, 0)] * len(logits)
    return probabilities(process(logits, rows), rows)


def markov_chain(draft: str = "random", **sampling: Any) -> Chain:
    """State = last token (0 at the start); target and draft are random and warped alike."""
    generator = torch.Generator().manual_seed(17)
    target_logits = torch.randn(VOCAB, VOCAB, generator=generator) * 1.5
    draft_logits = target_logits + torch.randn(VOCAB, VOCAB, generator=generator)
    target, raw = warped(target_logits, **sampling), draft_logits.softmax(-1)
    q = warped(draft_logits, **sampling)
    if draft == "one-hot":
        q = warped(draft_logits, temperature=0.0)
    elif draft == "truncated vocabulary":
        draft_logits[:, [1, 4]] = -torch.inf
        q = warped(draft_logits, **sampling)
    elif draft == "equal":
        q = target
    after = torch.arange(VOCAB).expand(VOCAB, VOCAB)
    return Chain(after, target, q, raw if draft == "unwarped" else q)


def simulate(
    chain: Chain,
    rule: RuleFunction,
    max_draft: int,
    n_samples: int,
    *,
    mixed: bool = False,
    shorten: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Speculative decoding of ``n_samples`` independent sequences; int64 [n_samples, DEPTH].

    ``mixed`` gives every block a random length from 0 to ``max_draft``; ``shorten`` may cut it further.
    """
    generator = torch.Generator().manual_seed(seed)
    output = torch.zeros(n_samples, DEPTH + max_draft + 1, dtype=torch.long)
    filled = torch.zeros(n_samples, dtype=torch.long)
    state = torch.full((n_samples,), chain.start)
    while len(active := (filled < DEPTH).nonzero().squeeze(1)):
        states = [state[active]]
        drafts = []
        for _ in range(max_draft):
            drafts.append(chain.draft[states[-1]].multinomial(1, generator=generator).squeeze(1))
            states.append(chain.after[states[-1], drafts[-1]])
        ids, visited = torch.stack(drafts, 1), torch.stack(states, 1)
        lengths = torch.full((len(active),), max_draft)
        if mixed:
            lengths = torch.randint(max_draft + 1, (len(active),), generator=generator)
        q = chain.declared[visited[:, :-1]]
        if shorten is not None:
            lengths = shorten(q, ids, lengths)
        q = q * (torch.arange(max_draft) < lengths.unsqueeze(1)).unsqueeze(2)
        p = chain.target[visited[:, :1].expand_as(visited) if chain.stale else visited]
        uniforms = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
        accepted, following = rule(p, q, ids, lengths, uniforms)
        token = following.multinomial(1, generator=generator)
        tokens = torch.cat([ids, ids[:, :1]], 1).scatter_(1, accepted.unsqueeze(1), token)
        places = filled[active].unsqueeze(1) + torch.arange(max_draft + 1)
        kept = (places < output.shape[1]) & (torch.arange(max_draft + 1) <= accepted.unsqueeze(1))
        output[active.unsqueeze(1).expand_as(places)[kept], places[kept]] = tokens[kept]
        state[active] = chain.after[visited.gather(1, accepted.unsqueeze(1)).squeeze(1), token.squeeze(1)]
        filled[active] += accepted + 1
    return output[:, :DEPTH]


def p_value(chain: Chain, samples: Tensor) -> float:
    return joint_chi_square(joint_counts(samples, VOCAB), chain.joint())


WARPINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "top_k and min_p": {"top_k": 3, "min_p": 0.1},
}


@pytest.mark.parametrize(
    ("max_draft", "draft", "warping"),
    [
        (1, "random", "plain"),
        (2, "random", "cold"),
        (3, "random", "top_p"),
        (4, "random", "top_k and min_p"),
        (3, "one-hot", "cold"),
        (2, "one-hot", "top_p"),
        (3, "truncated vocabulary", "plain"),
        (4, "equal", "plain"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_true_rule_passes(rule: str, max_draft: int, draft: str, warping: str) -> None:
    chain = markov_chain(draft, **WARPINGS[warping])
    assert p_value(chain, simulate(chain, RULES[rule], max_draft, N_SAMPLES)) > PASSES


@pytest.mark.parametrize("rule", RULES)
def test_mixed_lengths_pass(rule: str) -> None:
    chain = markov_chain()
    assert p_value(chain, simulate(chain, RULES[rule], 4, N_SAMPLES, mixed=True)) > PASSES


@pytest.mark.parametrize("rule", RULES)
def test_stopping_on_what_is_known_before_the_draw_passes(rule: str) -> None:
    def shorten(q: Tensor, _ids: Tensor, lengths: Tensor) -> Tensor:
        confident = q.amax(-1) > 0.5
        return torch.minimum(lengths, confident.long().cumprod(1).sum(1))

    chain = markov_chain()
    assert p_value(chain, simulate(chain, RULES[rule], 3, N_SAMPLES, shorten=shorten)) > PASSES


def rows_of(p: Tensor, accepted: Tensor) -> Tensor:
    return p[torch.arange(len(p)), accepted]


def residual_from_p(rule: RuleFunction) -> RuleFunction:
    """The recovered token is drawn from p instead of max(p - q, 0)."""

    def mutant(p: Tensor, q: Tensor, ids: Tensor, lengths: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = rule(p, q, ids, lengths, uniforms)
        return accepted, rows_of(p, accepted)

    return mutant


def no_bonus(rule: RuleFunction) -> RuleFunction:
    """A block that is accepted whole takes its last token from the last draft position, not the bonus one."""

    def mutant(p: Tensor, q: Tensor, ids: Tensor, lengths: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        accepted, following = rule(p, q, ids, lengths, uniforms)
        whole = (accepted == lengths).unsqueeze(1)
        return accepted, torch.where(whole, rows_of(p, (accepted - 1).clamp(min=0)), following)

    return mutant


def token_rule_residual(rule: RuleFunction) -> RuleFunction:
    """Block acceptance with the token rule's residual: P_i is left out."""

    def mutant(p: Tensor, q: Tensor, ids: Tensor, lengths: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = rule(p, q, ids, lengths, uniforms)
        padded = torch.nn.functional.pad(q, (0, 0, 0, 1))
        residual = (rows_of(p, accepted) - rows_of(padded, accepted)).clamp(min=1e-12)
        return accepted, residual / residual.sum(-1, keepdim=True)

    return mutant


@pytest.mark.parametrize("mutate", [residual_from_p, no_bonus])
@pytest.mark.parametrize("rule", RULES)
def test_mutated_next_token_is_rejected(rule: str, mutate: Callable[[RuleFunction], RuleFunction]) -> None:
    chain = markov_chain()
    for max_draft in (1, 2):  # a longer block puts its bonus token outside the three that are tested
        assert p_value(chain, simulate(chain, mutate(RULES[rule]), max_draft, N_SAMPLES)) < REJECTED


def test_block_rule_with_the_token_rules_residual_is_rejected() -> None:
    chain = markov_chain()
    assert p_value(chain, simulate(chain, token_rule_residual(verify_token), 3, N_SAMPLES)) > PASSES
    assert p_value(chain, simulate(chain, token_rule_residual(verify_block), 3, N_SAMPLES)) < REJECTED


@pytest.mark.parametrize("rule", RULES)
def test_unwarped_q_is_rejected(rule: str) -> None:
    chain = markov_chain("unwarped", temperature=0.6)
    assert p_value(chain, simulate(chain, RULES[rule], 2, N_SAMPLES)) < REJECTED


@pytest.mark.parametrize("rule", RULES)
def test_dropping_a_drawn_token_of_low_confidence_is_rejected(rule: str) -> None:
    def shorten(q: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        confident = q.gather(2, ids.unsqueeze(2)).squeeze(2) > 0.3
        return torch.minimum(lengths, confident.long().cumprod(1).sum(1))

    chain = markov_chain()
    assert p_value(chain, simulate(chain, RULES[rule], 3, N_SAMPLES, shorten=shorten)) < REJECTED


def penalised_chain() -> Chain:
    """State = set of tokens seen; logits are constant, so that only the penalties make the chain move."""
    n_states = 2**VOCAB
    rows = [
        Row(
            SamplingParams(presence_penalty=1.2, repetition_penalty=1.5, temperature=0.9),
            (0,),
            tuple(token for token in range(VOCAB) if seen >> token & 1),
            (),
            0,
            0,
        )
        for seen in range(n_states)
    ]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, VOCAB, generator=generator).expand(n_states, VOCAB)
    other = torch.randn(1, VOCAB, generator=generator).expand(n_states, VOCAB)
    target, draft = (probabilities(process(x, rows), rows) for x in (logits, other))
    after = torch.arange(n_states).unsqueeze(1) | (1 << torch.arange(VOCAB))
    return Chain(after, target, draft, draft)


@pytest.mark.parametrize("rule", RULES)
def test_penalties_must_see_the_drafted_prefix(rule: str) -> None:
    chain = penalised_chain()
    assert p_value(chain, simulate(chain, RULES[rule], 3, N_SAMPLES)) > PASSES
    stale = replace(chain, stale=True)
    assert p_value(chain, simulate(stale, RULES[rule], 3, N_SAMPLES)) < REJECTED


@pytest.mark.parametrize("rule", ["token", "block"])
def test_ragged_batches_through_verify_pass(rule: Any) -> None:
    """The same simulation through the public function: scores, rows and blocks of mixed lengths and kinds."""
    generator = torch.Generator().manual_seed(5)
    row = Row(SamplingParams(), (), (), (), 0, 0)

    def through_verify(
        p: Tensor, q: Tensor, ids: Tensor, lengths: Tensor, _uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        spans = lengths.tolist()
        blocks = [
            DraftBlock(tuple(drafts[:n]), None if one_hot and n else probs[:n])
            for drafts, probs, n in zip(ids.tolist(), q, spans, strict=True)
        ]
        inside = torch.arange(p.shape[1]) <= lengths.unsqueeze(1)
        scores = p[inside].log()
        verdicts = verify(scores, [row] * len(scores), blocks, rule, generator)
        tokens = torch.tensor([verdict.token_id for verdict in verdicts])
        following = torch.nn.functional.one_hot(tokens, VOCAB).float()
        return torch.tensor([verdict.accepted for verdict in verdicts]), following

    for draft in ("random", "one-hot"):
        one_hot = draft == "one-hot"
        chain = markov_chain(draft)
        samples = simulate(chain, through_verify, 3, N_SAMPLES // 10, mixed=True)
        assert p_value(chain, samples) > PASSES
