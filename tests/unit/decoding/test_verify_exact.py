"""The sampled rules by enumeration: every draft, every number of accepted tokens, no randomness.

A block of L drafts is verified and the sequence then continued from the target until L + 1 tokens are there.
Summed over all drafts with their weights, the joint distribution of those tokens must be the target's own.
"""

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from paceline.server.decoding.verify import (
    block_acceptance,
    match_prefix,
    token_acceptance,
    verify_block,
    verify_token,
)

torch.set_num_threads(1)

RULES = {"token": verify_token, "block": verify_block}
VOCAB = 3
LONGEST = 4


def softmax_table(seed: int, *, scale: float = 1.5) -> Tensor:
    """Next-token distributions after each last token; the last row is that of the start."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(VOCAB + 1, VOCAB, generator=generator) * scale).softmax(-1)


def without(table: Tensor, token: int) -> Tensor:
    """The same table with one token impossible."""
    table = table.clone()
    table[:, token] = 0
    return table / table.sum(-1, keepdim=True)


def one_hot(seed: int) -> Tensor:
    return torch.nn.functional.one_hot(softmax_table(seed).argmax(-1), VOCAB).float()


TABLES: dict[str, tuple[Tensor, Tensor]] = {
    "random": (softmax_table(0), softmax_table(1)),
    "close": (softmax_table(2), (0.9 * softmax_table(2) + 0.1 * softmax_table(3))),
    "far": (softmax_table(4, scale=4.0), softmax_table(5, scale=4.0)),
    "equal": (softmax_table(6), softmax_table(6)),
    "draft vocabulary truncated": (softmax_table(7), without(softmax_table(8), 1)),
    "target truncated": (without(softmax_table(9), 0), softmax_table(10)),
    "both truncated": (without(softmax_table(11), 0), without(softmax_table(12), 2)),
    "one-hot draft": (softmax_table(13), one_hot(14)),
    "greedy target": (one_hot(15), softmax_table(16)),
}


class Blocks:
    """All drafts of all lengths up to ``LONGEST``, padded into one batch."""

    def __init__(self, target: Tensor, draft: Tensor) -> None:
        self.drafts = [d for n in range(1, LONGEST + 1) for d in product(range(VOCAB), repeat=n)]
        self.lengths = torch.tensor([len(d) for d in self.drafts])
        # Padding: token 0, q = 0, and a target position that would show if it were read.
        self.ids = torch.tensor([[*d, *[0] * (LONGEST - len(d))] for d in self.drafts])
        self.p = torch.full((len(self.drafts), LONGEST + 1, VOCAB), 1 / VOCAB)
        self.q = torch.zeros(len(self.drafts), LONGEST, VOCAB)
        self.weights = torch.ones(len(self.drafts), dtype=torch.float64)
        for b, tokens in enumerate(self.drafts):
            contexts = [VOCAB, *tokens]
            self.p[b, : len(contexts)] = target[contexts]
            self.q[b, : len(tokens)] = draft[contexts[:-1]]
            for context, token in zip(contexts, tokens, strict=False):
                self.weights[b] *= draft[context, token].double()

    def accepted_probability(self, rule: str) -> Tensor:
        """P(exactly i tokens accepted), float64 [B, LONGEST + 1]."""
        result = torch.zeros(len(self.drafts), LONGEST + 1, dtype=torch.float64)
        if rule == "token":
            keep = token_acceptance(self.p, self.q, self.ids)
            for b, n in enumerate(self.lengths.tolist()):
                for i in range(n + 1):
                    refused = 1 - keep[b, i] if i < n else 1.0
                    result[b, i] = keep[b, :i].prod() * refused
        else:
            keep, _ = block_acceptance(self.p, self.q, self.ids, self.lengths)
            for b, n in enumerate(self.lengths.tolist()):
                for i in range(n + 1):
                    kept = keep[b, i - 1] if i else 1.0
                    result[b, i] = kept * (1 - keep[b, i:n]).prod()
        return result

    def forced(self, rule: str, count: int) -> tuple[Tensor, Tensor]:
        """Run the rule with uniforms that accept ``count`` tokens wherever that can happen."""
        uniforms = torch.ones(len(self.drafts), LONGEST, dtype=torch.float64)
        uniforms[:, :count] = 0.0
        return RULES[rule](self.p, self.q, self.ids, self.lengths, uniforms)


def joint_of_target(target: Tensor, depth: int) -> Tensor:
    joint = torch.ones((VOCAB,) * depth, dtype=torch.float64)
    for tokens in product(range(VOCAB), repeat=depth):
        for context, token in zip((VOCAB, *tokens), tokens, strict=False):
            joint[tokens] *= target[context, token].double()
    return joint


def joint_of_output(rule: str, blocks: Blocks, target: Tensor) -> dict[int, Tensor]:
    """By block length L, the joint distribution of the first L + 1 tokens."""
    joints = {n: torch.zeros((VOCAB,) * (n + 1), dtype=torch.float64) for n in range(1, LONGEST + 1)}
    chance = blocks.accepted_probability(rule) * blocks.weights.unsqueeze(1)
    for count in range(LONGEST + 1):
        accepted, following = blocks.forced(rule, count)
        for b, tokens in enumerate(blocks.drafts):
            if chance[b, count] == 0:
                continue
            assert accepted[b] == count
            n = len(tokens)
            for rest in product(range(VOCAB), repeat=n + 1 - count):
                mass = chance[b, count] * following[b, rest[0]]
                for context, token in pairwise(rest):
                    mass = mass * target[context, token]
                joints[n][(*tokens[:count], *rest)] += mass
    return joints


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("rule", RULES)
def test_output_has_the_targets_joint_distribution(rule: str, tables: str) -> None:
    target, draft = TABLES[tables]
    blocks = Blocks(target, draft)
    assert torch.allclose(blocks.accepted_probability(rule).sum(1), torch.ones(1, dtype=torch.float64))
    for n, joint in joint_of_output(rule, blocks, target).items():
        assert (joint - joint_of_target(target, n + 1)).abs().max() < 1e-6, f"block of {n}"


@pytest.mark.parametrize("tables", TABLES)
def test_block_rule_accepts_at_least_as_much_as_token_rule(tables: str) -> None:
    blocks = Blocks(*TABLES[tables])
    at_least = {}
    for rule in RULES:
        chance = blocks.accepted_probability(rule) * blocks.weights.unsqueeze(1)
        expected = (chance * torch.arange(LONGEST + 1)).sum(1)
        at_least[rule] = [float(expected[blocks.lengths == n].sum()) for n in range(1, LONGEST + 1)]
    assert at_least["block"][0] == pytest.approx(at_least["token"][0], abs=1e-6)
    assert all(b >= t - 1e-6 for b, t in zip(at_least["block"], at_least["token"], strict=True))
    if tables in ("random", "close", "far"):
        assert at_least["block"][-1] > at_least["token"][-1] + 1e-3


def test_worked_example_of_the_block_formula() -> None:
    # p = (1/3, 2/3), q = (2/3, 1/3) at every position, drafts (0, 1): P_1 = 1/2, P_2 = min(1/2 * 2, 1) = 1.
    p = torch.tensor([1 / 3, 2 / 3]).expand(1, 3, 2).contiguous()
    q = torch.tensor([2 / 3, 1 / 3]).expand(1, 2, 2).contiguous()
    keep, joint = block_acceptance(p, q, torch.tensor([[0, 1]]), torch.tensor([2]))
    # S_1 = max(1/6 - 2/3, 0) + max(1/3 - 1/3, 0) = 0, so h_1 = 0; h_2 = P_2 = 1: both tokens are always kept,
    # where the token rule keeps the first with 1/2.
    assert joint[0].tolist() == pytest.approx([0.5, 1.0], abs=1e-6)
    assert keep[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert token_acceptance(p, q, torch.tensor([[0, 1]]))[0].tolist() == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("rule", RULES)
def test_draft_equal_to_target_is_always_accepted_whole(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, 6, 1000, generator=generator).softmax(-1)
    drafts = p[:, :-1].argmax(-1)
    uniforms = torch.full((50, 5), 1 - 2.0**-53, dtype=torch.float64)
    accepted, following = RULES[rule](p, p[:, :-1], drafts, torch.full((50,), 5), uniforms)
    assert accepted.tolist() == [5] * 50
    assert torch.allclose(following, p[:, -1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("uniform", [0.0, 0.5])
def test_impossible_tokens_are_never_accepted(rule: str, uniform: float) -> None:
    # First block: the target excludes the draft token; second: the draft claims q = 0 for its own token.
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    q = torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]])
    uniforms = torch.full((2, 1), uniform, dtype=torch.float64)
    accepted, following = RULES[rule](
        p, q, torch.zeros(2, 1, dtype=torch.long), torch.tensor([1, 1]), uniforms
    )
    assert accepted.tolist() == [0, 0]
    assert following.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_rounding_never_yields_an_empty_or_undefined_distribution(rule: str) -> None:
    tiny = 1e-45
    p = torch.tensor([[[1.0, tiny, 0.0]] * 3, [[0.6, 0.4 - 1e-7, 0.0]] * 3])
    q = torch.tensor([[[1.0, tiny, 0.0]] * 2, [[0.6, 0.4, 0.0]] * 2])
    lengths = torch.tensor([2, 2])
    for drafts, uniforms in product(product(range(3), repeat=2), product([0.0, 1.0], repeat=2)):
        ids, draws = torch.tensor([drafts] * 2), torch.tensor([uniforms] * 2, dtype=torch.float64)
        accepted, following = RULES[rule](p, q, ids, lengths, draws)
        assert following.isfinite().all()
        assert torch.allclose(following.sum(-1), torch.ones(2))
        assert ((accepted >= 0) & (accepted <= 2)).all()


@pytest.mark.parametrize("rule", RULES)
def test_blocks_do_not_depend_on_each_other_or_on_padding(rule: str) -> None:
    blocks = Blocks(*TABLES["random"])
    uniforms = torch.rand(blocks.ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    accepted, following = RULES[rule](blocks.p, blocks.q, blocks.ids, blocks.lengths, uniforms)
    for b in range(0, len(blocks.drafts), 7):
        n = len(blocks.drafts[b])
        alone = RULES[rule](
            blocks.p[b : b + 1, : n + 1],
            blocks.q[b : b + 1, :n],
            blocks.ids[b : b + 1, :n],
            torch.tensor([n]),
            uniforms[b : b + 1, :n],
        )
        assert alone[0] == accepted[b]
        assert torch.equal(alone[1][0], following[b])


@pytest.mark.parametrize("rule", RULES.values())
def test_inputs_are_not_modified(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    blocks = Blocks(*TABLES["random"])
    uniforms = torch.rand(blocks.ids.shape, dtype=torch.float64)
    arguments = [blocks.p, blocks.q, blocks.ids, blocks.lengths, uniforms]
    before = [argument.clone() for argument in arguments]
    rule(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_match_prefix() -> None:
    assert (match_prefix([4], []).accepted, match_prefix([4], []).token_id) == (0, 4)
    cases = [([1, 2, 3], [1, 2], 2, 3), ([1, 2, 3], [1, 5], 1, 2), ([1, 2, 3], [5, 2], 0, 1)]
    for outputs, drafts, accepted, token in cases:
        verdict = match_prefix(outputs, drafts)
        assert (verdict.accepted, verdict.token_id) == (accepted, token)
