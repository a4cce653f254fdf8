"""Native verification decides and draws as the torch rules do with the same uniforms; they are the oracle."""

import random
from collections.abc import Sequence

import pytest
import torch
from native_kernels import pool
from torch import Tensor

from paceline.kernels.cpu.verification import SampledBlock, verify_sampled
from paceline.server.decoding.verify import DraftBlock, spread_probs, verify_block, verify_token

#: Not a multiple of the kernels' chunk or lanes.
VOCAB = 2071
ROWS = 6


def scores_of(seed: int, rows: int, vocab: int = VOCAB) -> Tensor:
    """Peaked, with some ids removed, and all of a chunk."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=generator) * 3
    scores[torch.rand(rows, vocab, generator=generator) < 0.2] = -torch.inf
    scores[:, 512:1024] = -torch.inf
    return scores


def block_of(rng: random.Random, scores: Tensor, first_row: int, kind: str, length: int) -> SampledBlock:
    """A block whose q is near to the target's p, drawn from q."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    columns, width = None, scores.shape[1]
    if kind == "some ids":
        columns = torch.tensor(sorted(rng.sample(range(width), 700)))
    elif kind == "first ids":
        width = 900
    near = scores[first_row : first_row + length] + torch.randn(length, scores.shape[1], generator=generator)
    q = (near[:, :width] if columns is None else near[:, columns]).nan_to_num(neginf=-1e9).softmax(-1)
    drawn = torch.multinomial(q, 1, generator=generator).flatten().tolist() if length else []
    tokens = drawn if columns is None else [int(columns[i]) for i in drawn]
    if kind == "one-hot":
        return SampledBlock(first_row, scores[first_row : first_row + length].argmax(-1).tolist())
    return SampledBlock(first_row, tokens, q, columns)


def oracle(scores: Tensor, block: SampledBlock, uniforms: Tensor, *, by_block: bool) -> tuple[int, int]:
    count = len(block.token_ids)
    p = scores[block.first_row : block.first_row + count + 1].softmax(-1)
    q = torch.zeros(count, scores.shape[1])
    if block.q is None:
        q[torch.arange(count), list(block.token_ids)] = 1.0
    elif count:
        spread_probs(DraftBlock(tuple(block.token_ids), block.q, block.columns), q)
    accepted, following = 0, p[0]
    if count:
        rule = verify_block if by_block else verify_token
        drafts, lengths = torch.tensor([list(block.token_ids)]), torch.tensor([count])
        kept, rest = rule(p[None], q[None], drafts, lengths, uniforms[None, :count])
        accepted, following = int(kept), rest[0]
    cumulative = following.double().cumsum(0)
    return accepted, int(torch.searchsorted(cumulative, uniforms[-1] * cumulative[-1], right=True))


def uniforms_for(blocks: Sequence[SampledBlock], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(len(block.token_ids) + 1, dtype=torch.float64, generator=generator) for block in blocks
    ]


@pytest.mark.parametrize("by_block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize("kind", ["all ids", "some ids", "first ids", "one-hot"])
def test_verdicts_are_those_of_the_torch_rules(isa, kind, by_block):
    rng = random.Random(3)
    lengths = [rng.randint(0, ROWS - 1) for _ in range(60)]
    scores = scores_of(1, ROWS * len(lengths))
    blocks = [block_of(rng, scores, ROWS * i, kind, length) for i, length in enumerate(lengths)]
    uniforms = uniforms_for(blocks, 2)
    got = verify_sampled(scores, blocks, torch.cat(uniforms), by_block=by_block, pool=pool(isa))
    expected = [
        oracle(scores, block, own, by_block=by_block) for block, own in zip(blocks, uniforms, strict=True)
    ]
    assert got == expected
    assert len({accepted for accepted, _ in got}) > 2
    assert all(
        scores[block.first_row + a, token] > -torch.inf for block, (a, token) in zip(blocks, got, strict=True)
    )


@pytest.mark.parametrize("by_block", [False, True], ids=["token", "block"])
def test_a_residual_that_is_zero_everywhere_gives_p(isa, by_block):
    """q above p everywhere, as only rounding makes it: refused, the next token comes from p."""
    scores = scores_of(5, 2)
    q = scores[:1].softmax(-1) * 1.5
    token = int(q.argmax())
    uniforms = torch.tensor([0.9, 0.4], dtype=torch.float64)
    block = SampledBlock(0, [token], q)
    got = verify_sampled(scores, [block], uniforms, by_block=by_block, pool=pool(isa))
    cumulative = scores[0].softmax(-1).double().cumsum(0)
    assert got == [(0, int(torch.searchsorted(cumulative, 0.4, right=True)))]


def test_the_ends_of_the_uniforms_draw_possible_tokens(isa):
    scores = scores_of(7, 2)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    drawn = verify_sampled(scores, [SampledBlock(0), SampledBlock(1)], ends, by_block=True, pool=pool(isa))
    possible = [(scores[i] > -torch.inf).nonzero().flatten() for i in range(2)]
    assert drawn[0] == (0, int(possible[0][0]))
    last = drawn[1][1]
    assert scores[1, last] > -torch.inf
    assert scores[1].softmax(-1).double().cumsum(0)[last] > 1 - 1e-5
