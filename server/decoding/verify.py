"""Verification of draft blocks: how many draft tokens are accepted, and which token comes after them.

Owns the three exact rules and the lossy one. Greedy and seeded choices compare the draft with the tokens the
target would have chosen (coupled verification, Daliri et al. 2408.07978); unseeded sampled choices use the
token-wise rule of speculative sampling (Leviathan et al. 2211.17192, Chen et al. 2302.01318) or block verification
(Sun et al. 2403.10444). Whatever the draft proposed, committed tokens follow the target's processed distribution. Only
lenience (DistillSpec, 2310.08461), where a request asks for it, trades that for acceptance.

Words: *accepted* draft tokens are kept; after the first rejection comes one *recovered* token; after a block
that is accepted whole comes one *bonus* token. Shapes: B blocks, K = longest block, V = vocabulary; p is the
target's distribution, q the one the draft tokens were really drawn from. Knows no sequences, no KV cache, no
draft model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from paceline.server.decoding.lenience import Lenience, match_likely
from paceline.server.decoding.rows import Row, is_greedy, is_seeded, is_unseeded
from paceline.server.decoding.sampler import draw, random_uniforms, sample

Rule = Literal["token", "block"]
_Group = Literal["coupled", "sampled", "lenient greedy", "lenient sampled"]
#: p, q, drafts and lengths of ``verify_token``; with uniforms they are what a rule gets.
_Padded = tuple[Tensor, Tensor, Tensor, Tensor]
_Check = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """The tokens a proposer drafted for one choice in one step.

    Attributes:
        token_ids: K draft tokens, K may be 0.
        probs: fp32 [K, n], the processed distribution each token was drawn from; None if the tokens were
            proposed deterministically (q is one-hot). Greedy and seeded choices do not need it.
        columns: token id of each column of ``probs``, ascending, int64 [n]; None is the first n ids. Others
            have q = 0.
    """

    token_ids: tuple[int, ...]
    probs: Tensor | None = None
    columns: Tensor | None = None


#: (scores, first row of each block, blocks, uniforms, rule) -> (accepted, token after) per block; uniforms are float64
#: in [0, 1), of each block one per draft token and one for the token after.
NativeRule = Callable[
    [Tensor, Sequence[int], Sequence["DraftBlock"], Tensor, Rule], Sequence[tuple[int, int]]
]


#: (scores, rows) -> tokens, for greedy and seeded rows; in the place of ``sampler.draw``.
NativeChoice = Callable[[Tensor, Sequence[Row]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``accepted`` draft tokens are committed, and after them ``token_id`` (recovered or bonus)."""

    accepted: int
    token_id: int


def verify(
    scores: Tensor,
    rows: Sequence[Row],
    blocks: Sequence[DraftBlock],
    rule: Rule,
    generator: torch.Generator,
    lenience: Lenience | None = None,
    native: NativeRule | None = None,
    choose: NativeChoice | None = None,
) -> list[Verdict]:
    """Verify a ragged batch of draft blocks against the target's scores.

    Args:
        scores: fp32 [N, V] from ``sampler.process``, block after block; a block of K tokens has K + 1 rows,
            row j being the target's position after j draft tokens. An empty block is a plain draw.
        rows: N rows that match ``scores``; ``output_ids`` of row j includes the first j draft tokens.
        blocks: the draft blocks.
        rule: for unseeded sampled choices without lenience, where it is always token-wise; the others are coupled.
        generator: numbers for unseeded sampled choices.
        lenience: e per block; None is exact everywhere. Seeded choices are exact in any case.
        native: verifies and draws for unseeded sampled choices without lenience, in the place of the torch rules.
        choose: chooses for greedy and seeded choices; comes with ``native`` only.

    Returns:
        One verdict per block.
    """
    sizes = [len(block.token_ids) + 1 for block in blocks]
    assert len(rows) == scores.shape[0] == sum(sizes), (
        f"{len(rows)} rows, {scores.shape[0]} scores, blocks {sizes}"
    )
    starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
    values = [1.0] * len(blocks) if lenience is None else lenience.values
    groups = _group([rows[at] for at in starts], sizes, values, draws_natively=native is not None)
    verdicts: dict[int, Verdict] = {}
    pairs: Sequence[tuple[int, int]]
    if chosen := groups["coupled"]:
        spans = [(starts[i], starts[i] + sizes[i]) for i in chosen]
        assert choose is None or native is not None, "unseeded choices would be among the coupled ones"
        outputs = _draw_spans(scores, rows, spans, choose or partial(_draw_in_torch, generator=generator))
        drafts = [blocks[i].token_ids for i in chosen]
        verdicts.update(zip(chosen, map(match_prefix, outputs, drafts), strict=True))
    if chosen := groups["lenient greedy"]:
        index = [at for i in chosen for at in range(starts[i], starts[i] + sizes[i])]
        drafts = [blocks[i].token_ids for i in chosen]
        pairs = match_likely(scores[index], drafts, [values[i] for i in chosen])
        verdicts.update((i, Verdict(*pair)) for i, pair in zip(chosen, pairs, strict=True))
    if (chosen := groups["sampled"]) and native is not None:
        uniforms = random_uniforms((sum(sizes[i] for i in chosen),), generator, scores.device)
        pairs = native(scores, [starts[i] for i in chosen], [blocks[i] for i in chosen], uniforms, rule)
        verdicts.update((i, Verdict(*pair)) for i, pair in zip(chosen, pairs, strict=True))
    elif chosen:
        padded = _pad(scores, [starts[i] for i in chosen], [blocks[i] for i in chosen])
        verdicts.update(zip(chosen, _draw_verdicts(_RULES[rule], padded, generator), strict=True))
    if chosen := groups["lenient sampled"]:
        assert lenience is not None
        check = partial(verify_token, lenience=Lenience([values[i] for i in chosen], lenience.form))
        padded = _pad(scores, [starts[i] for i in chosen], [blocks[i] for i in chosen])
        verdicts.update(zip(chosen, _draw_verdicts(check, padded, generator), strict=True))
    return [verdicts[i] for i in range(len(blocks))]


def _group(
    rows: Sequence[Row], sizes: Sequence[int], values: Sequence[float], *, draws_natively: bool
) -> dict[_Group, list[int]]:
    """Which blocks are verified in which way: first row, rows and lenience of each; empty ones are drawn for."""
    groups: dict[_Group, list[int]] = {name: [] for name in get_args(_Group)}
    for i, (row, size, value) in enumerate(zip(rows, sizes, values, strict=True)):
        lenient = value < 1 and size > 1 and not is_seeded(row)
        if lenient:
            groups["lenient greedy" if is_greedy(row) else "lenient sampled"].append(i)
        else:
            sampled = is_unseeded(row) and (size > 1 or draws_natively)
            groups["sampled" if sampled else "coupled"].append(i)
    return groups


def _draw_verdicts(check: _Check, padded: _Padded, generator: torch.Generator) -> list[Verdict]:
    """Let a rule decide with fresh uniforms, and draw the token that follows."""
    drafts = padded[2]
    uniforms = random_uniforms(tuple(drafts.shape), generator, drafts.device)
    accepted, following = check(*padded, uniforms)
    pairs = zip(accepted.tolist(), sample(following, generator).tolist(), strict=True)
    return [Verdict(*pair) for pair in pairs]


def match_prefix(outputs: Sequence[int], drafts: Sequence[int]) -> Verdict:
    """Coupled verification: a draft token is accepted iff it is the token the target chose at its position.

    Args:
        outputs: the target's K + 1 choices.
        drafts: the K draft tokens.
    """
    accepted = 0
    while accepted < len(drafts) and outputs[accepted] == drafts[accepted]:
        accepted += 1
    return Verdict(accepted, outputs[accepted])


def verify_token(
    p: Tensor,
    q: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
    lenience: Lenience | None = None,
) -> tuple[Tensor, Tensor]:
    """Token-wise speculative sampling (2211.17192, algorithm 1).

    Args:
        p: fp32 [B, K+1, V] target distributions; positions past a block's length are ignored.
        q: fp32 [B, K, V] draft distributions; zero past a block's length.
        drafts: int64 [B, K] draft tokens; any valid id past a block's length.
        lengths: int64 [B], each 0..K.
        uniforms: float64 [B, K] in [0, 1).
        lenience: e for each of the B blocks. A rejection still implies p(y) < q(y), so that the recovered token comes
            from the same residual.

    Returns:
        ``accepted`` int64 [B] and the distribution of the token that follows, fp32 [B, V].
    """
    kept = (uniforms < token_acceptance(p, q, drafts, lenience)) & _inside(lengths, drafts)
    accepted = kept.long().cumprod(dim=1).sum(dim=1)
    return accepted, _following(p, q, accepted, scale=None)


def verify_block(
    p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Block verification (2403.10444, algorithm 2): accepts at least as much as token-wise in expectation.

    Arguments and results are those of ``verify_token``.
    """
    acceptance, joint = block_acceptance(p, q, drafts, lengths)
    kept = (uniforms < acceptance) & _inside(lengths, drafts)
    positions = torch.arange(1, drafts.shape[1] + 1, device=p.device)
    # The longest kept prefix; the column of zeros is the empty one, always kept.
    accepted = pad(kept.long() * positions, (1, 0)).amax(dim=1)
    scale = pad(joint, (1, 0), value=1.0).gather(1, accepted.unsqueeze(1))
    return accepted, _following(p, q, accepted, scale=scale.float())


def token_acceptance(p: Tensor, q: Tensor, drafts: Tensor, lenience: Lenience | None = None) -> Tensor:
    """min(1, f(p_i(y_i)) / q_i(y_i)), float64 [B, K]; f is the identity without lenience.

    A token with q = 0 cannot have been drawn; it is refused.
    """
    return _ratios(p, q, drafts, lenience).clamp_(max=1.0)


def block_acceptance(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Probability h_i of keeping the prefix of length i if no longer one is kept, and its P_i.

    P_i = min(P_{i-1} p_i(y_i) / q_i(y_i), 1); S_i = sum_v max(P_i p_{i+1}(v) - q_{i+1}(v), 0);
    h_i = S_i / (S_i + 1 - P_i), 1 if that is 0/0, and h_i = P_i at the block's last token.

    Returns:
        h and P, float64 [B, K].
    """
    joint = _ratios(p, q, drafts)
    previous = torch.ones_like(joint[:, 0])
    for i in range(joint.shape[1]):
        previous = torch.mul(previous, joint[:, i]).clamp_(max=1.0)
        joint[:, i] = previous
    n_inner = joint.shape[1] - 1
    surplus = p[:, 1:-1] * joint[:, :n_inner, None].float()
    surplus = surplus.sub_(q[:, 1:]).clamp_(min=0).sum(dim=2, dtype=torch.float64)
    missing = surplus + 1 - joint[:, :n_inner]
    acceptance = joint.clone()
    acceptance[:, :n_inner] = torch.where(missing > 0, surplus / missing, 1.0)
    last = torch.arange(1, joint.shape[1] + 1, device=p.device) == lengths.unsqueeze(1)
    return torch.where(last, joint, acceptance), joint


def _ratios(p: Tensor, q: Tensor, drafts: Tensor, lenience: Lenience | None = None) -> Tensor:
    """f(p_i(y_i)) / q_i(y_i) in float64, where fp32 quotients neither overflow nor vanish; 0 where q is 0."""
    at = drafts.unsqueeze(2)
    p_drafts = p[:, :-1].gather(2, at).squeeze(2).double()
    if lenience is not None:
        p_drafts = lenience.apply(p_drafts)
    q_drafts = q.gather(2, at).squeeze(2).double()
    return torch.where(q_drafts > 0, p_drafts / q_drafts, 0.0)


def _inside(lengths: Tensor, drafts: Tensor) -> Tensor:
    """bool [B, K]: the position holds a draft token."""
    return torch.arange(drafts.shape[1], device=drafts.device) < lengths.unsqueeze(1)


def _following(p: Tensor, q: Tensor, accepted: Tensor, scale: Tensor | None) -> Tensor:
    """norm(max(scale * p - q, 0)) at the first position that was not accepted, fp32 [B, V].

    Past the block's end q is zero, so the same expression gives p, the bonus token's distribution.
    """
    index = torch.arange(p.shape[0], device=p.device)
    target = p[index, accepted]
    n_drafted = q.shape[1]
    draft = q[index, accepted.clamp(max=n_drafted - 1)]
    draft.masked_fill_((accepted == n_drafted).unsqueeze(1), 0.0)
    residual = (target if scale is None else target * scale).sub(draft).clamp_(min=0)
    # Where p <= q everywhere, p equals q: only rounding can reject there, and p is the limit of the residual.
    empty = residual.sum(dim=1, keepdim=True) == 0
    residual = torch.where(empty, target, residual)
    return residual.div_(residual.sum(dim=1, keepdim=True))


def _draw_in_torch(scores: Tensor, rows: Sequence[Row], *, generator: torch.Generator) -> list[int]:
    return draw(scores, rows, generator).tolist()


def _draw_spans(
    scores: Tensor, rows: Sequence[Row], spans: Sequence[tuple[int, int]], choose: NativeChoice
) -> list[list[int]]:
    """The target's own choices for each span of rows."""
    index = [at for start, end in spans for at in range(start, end)]
    if len(index) == len(rows):
        outputs = iter(choose(scores, rows))
    else:
        outputs = iter(choose(scores[index], [rows[at] for at in index]))
    return [[next(outputs) for _ in range(start, end)] for start, end in spans]


def _pad(scores: Tensor, starts: Sequence[int], blocks: Sequence[DraftBlock]) -> _Padded:
    """p, q, drafts and lengths of ``verify_token`` for blocks of at least one token each."""
    lengths = [len(block.token_ids) for block in blocks]
    longest = max(lengths)
    index = [[at + min(j, n) for j in range(longest + 1)] for at, n in zip(starts, lengths, strict=True)]
    drafts = [list(block.token_ids) + [0] * (longest - n) for block, n in zip(blocks, lengths, strict=True)]
    q = scores.new_zeros(len(blocks), longest, scores.shape[1])
    for b, block in enumerate(blocks):
        if block.probs is None:
            q[b, torch.arange(lengths[b]), list(block.token_ids)] = 1.0
        else:
            assert len(block.probs) == lengths[b], f"draft probs {list(block.probs.shape)}"
            spread_probs(block, q[b])
    device = scores.device
    p = scores[torch.tensor(index, device=device)].softmax(dim=-1)
    return p, q, torch.tensor(drafts, device=device), torch.tensor(lengths, device=device)


def spread_probs(block: DraftBlock, out: Tensor) -> None:
    """Write a block's q in its places among all ids.

    Args:
        block: with ``probs``.
        out: fp32 [at least K, V], zero.
    """
    assert block.probs is not None
    count, width = block.probs.shape
    if block.columns is None:
        out[:count, :width] = block.probs
    else:
        out[:count].index_copy_(1, block.columns, block.probs)


_RULES: Mapping[Rule, _Check] = {"token": verify_token, "block": verify_block}
