"""Combining, drawing and verifying by Triton's interpreter against the slow reference, and the reference against the
server's own functions."""

from collections.abc import Callable

import pytest
import torch

from paceline.kernels import ops, reference_sampling
from paceline.kernels.gpu import runtime
from paceline.kernels.noise import streams
from paceline.server.decoding import verify as rules

pytest.importorskip("triton")

INF = float("inf")


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_KERNELS", "triton")
    runtime.forget_launches()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 ids, so that small vocabularies have many."""
    for module in ("combine", "verify"):
        monkeypatch.setattr(runtime.load(module, "cpu"), "BLOCK", 32)


def inputs(rows: int, width: int, count: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    members = [3 * torch.randn(rows, width, generator=generator) for _ in range(count)]
    return members, torch.randn(rows, count, generator=generator)


def settings(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Temperatures of every kind, 1 among them; two rows of three are sampled."""
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    temperatures = torch.tensor([1.0, 0.7, 1e-30, 2.0])[torch.arange(rows) % 4]
    return {"temperatures": temperatures, "keys": keys, "is_sampled": torch.arange(rows) % 3 != 1}


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 1, 1), (9, 31, 1), (5, 32, 2), (6, 100, 3), (2, 300, 4)]
)
def test_combine_is_the_reference(rows: int, width: int, count: int) -> None:
    members, weights = inputs(rows, width, count)
    given = settings(rows)
    tokens, logits = ops.combine(members, weights, **given)
    wanted = reference_sampling.combine(members, weights, *given.values())
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(logits, wanted[1])
    launched = {"combine_kernel", "pick_kernel", *(["perturb_kernel"] if given["is_sampled"].any() else [])}
    assert set(runtime.launches()) == launched


def test_the_noise_and_the_temperature_matter() -> None:
    members, _ = inputs(12, 40, 1)
    ones, given = torch.ones(12, 1), settings(12)
    drawn = ops.combine(members, ones, **given)[0]
    for name, other in (
        ("keys", given["keys"] + 1),
        ("temperatures", given["temperatures"].flip(0)),
        ("is_sampled", ~given["is_sampled"]),
    ):
        assert not torch.equal(drawn, ops.combine(members, ones, **given | {name: other})[0]), name
    greedy = given | {"is_sampled": torch.zeros(12, dtype=torch.bool)}
    assert torch.equal(ops.combine(members, ones, **greedy)[0], members[0].argmax(-1))


def test_the_noise_is_that_of_torch_in_every_bit() -> None:
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63), 123456789])
    noise = streams(keys, 60)
    flat = torch.zeros(5, 60)
    everything = torch.ones(5, dtype=torch.bool)
    tokens, _ = ops.combine(
        [flat], torch.ones(5, 1), temperatures=torch.ones(5), keys=keys, is_sampled=everything
    )
    assert torch.equal(tokens, noise.argmax(-1))
    # With everything but two ids out of reach the draw compares two numbers: any bit may decide.
    for at in range(0, 58, 9):
        gap = noise[:, at] - noise[:, at + 1]
        pair = torch.full((5, 60), -INF)
        pair[:, at], pair[:, at + 1] = 0.0, gap
        tokens, _ = ops.combine(
            [pair], torch.ones(5, 1), temperatures=torch.ones(5), keys=keys, is_sampled=everything
        )
        assert torch.equal(tokens, (pair + noise).argmax(-1))


def test_ties_keep_the_lower_id_within_and_across_chunks() -> None:
    scores = torch.zeros(3, 100)
    scores[0, [40, 41, 99]] = 2.0
    scores[1, [31, 32]] = 2.0
    given = settings(3) | {"is_sampled": torch.zeros(3, dtype=torch.bool)}
    assert ops.combine([scores], torch.ones(3, 1), **given)[0].tolist() == [40, 31, 0]


def test_a_member_of_weight_zero_is_left_out_bit_for_bit() -> None:
    members, _ = inputs(4, 70, 3)
    members[1][:, 5] = -INF
    weights = torch.zeros(4, 3)
    weights[:, 0] = 1
    assert torch.equal(ops.combine(members, weights, **settings(4))[1], members[0])


def test_removed_tokens_are_never_drawn() -> None:
    scores = torch.full((8, 90), -INF)
    scores[:, 77] = -50.0
    given = settings(8) | {"is_sampled": torch.ones(8, dtype=torch.bool)}
    assert (ops.combine([scores], torch.ones(8, 1), **given)[0] == 77).all()


def test_rows_of_wider_tensors() -> None:
    wide = torch.randn(4, 120)
    given = settings(4)
    cut = ops.combine([wide[:, :90]], torch.ones(4, 1), **given)
    assert torch.equal(cut[1], wide[:, :90])
    assert torch.equal(cut[0], ops.combine([wide[:, :90].clone()], torch.ones(4, 1), **given)[0])


def blocks(count: int, depth: int, width: int, seed: int, likeness: float) -> dict[str, torch.Tensor]:
    """Scores and draft blocks of lengths 0..depth; q is like p by ``likeness``."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(count * (depth + 1), width, generator=generator)
    own = scores.view(count, depth + 1, width)[:, :depth]
    other = 2 * torch.randn(count, depth, width, generator=generator)
    q = (likeness * own + (1 - likeness) * other).softmax(-1)
    drafts = torch.multinomial(q.view(-1, width), 1, generator=generator) if depth else torch.zeros(0)
    return {
        "scores": scores,
        "first_rows": torch.arange(count) * (depth + 1),
        "drafts": drafts.view(count, depth).long(),
        "lengths": torch.randint(0, depth + 1, (count,), generator=generator),
        "q": q,
        "uniforms": torch.rand(count, depth + 1, dtype=torch.float64, generator=generator),
    }


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("likeness", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(("depth", "width"), [(0, 40), (1, 1), (1, 64), (5, 100), (3, 33)])
def test_verify_is_the_reference(depth: int, width: int, likeness: float, by_block: bool) -> None:
    given = blocks(5, depth, width, seed=depth * width, likeness=likeness)
    got = ops.verify(**given, by_block=by_block)
    wanted = reference_sampling.verify(**given, by_block=by_block)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    if likeness and depth == 5:
        assert int(got[0].sum()) > 0


@pytest.mark.parametrize("by_block", [False, True])
def test_the_reference_accepts_what_the_server_accepts(by_block: bool) -> None:
    rule: Callable[..., tuple[torch.Tensor, torch.Tensor]] = (
        rules.verify_block if by_block else rules.verify_token
    )
    for seed in range(5):
        given = blocks(30, 4, 50, seed, likeness=0.7)
        accepted, tokens = reference_sampling.verify(**given, by_block=by_block)
        inside = torch.arange(4) < given["lengths"][:, None]
        p, q = given["scores"].view(30, 5, 50).softmax(-1), given["q"] * inside[..., None]
        kept, following = rule(p, q, given["drafts"], given["lengths"], given["uniforms"][:, :4])
        assert torch.equal(accepted, kept)
        assert (following.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("by_block", [False, True])
def test_verified_tokens_follow_the_target(by_block: bool) -> None:
    """The first token of 2,000 blocks against p; drafts are drawn from a q that is far off."""
    count, width = 2000, 6
    generator = torch.Generator().manual_seed(3)
    p_scores, q = (
        torch.randn(3, width, generator=generator),
        torch.randn(2, width, generator=generator).softmax(-1),
    )
    drafts = torch.stack(
        [torch.multinomial(row, count, replacement=True, generator=generator) for row in q], 1
    )
    # The reference draws them all; the kernels, interpreted block by block, must draw the first of them alike.
    sample = slice(0, 8)
    given = {
        "scores": p_scores,
        "first_rows": torch.zeros(count, dtype=torch.int64),
        "drafts": drafts,
        "lengths": torch.full((count,), 2),
        "q": q.expand(count, 2, width).contiguous(),
        "uniforms": torch.rand(count, 3, dtype=torch.float64, generator=generator),
    }
    accepted, tokens = reference_sampling.verify(**given, by_block=by_block)
    part = {name: value if name == "scores" else value[sample] for name, value in given.items()}
    assert all(map(torch.equal, ops.verify(**part, by_block=by_block), (accepted[sample], tokens[sample])))
    first = torch.where(accepted > 0, drafts[:, 0], tokens)
    shares = first.bincount(minlength=width) / count
    assert (shares - p_scores[0].softmax(-1)).abs().max() < 0.045  # four standard deviations


def test_a_token_that_q_cannot_draw_is_refused_and_p_equal_to_q_accepted() -> None:
    given = blocks(6, 3, 40, 1, likeness=1.0) | {"lengths": torch.full((6,), 3)}
    assert (ops.verify(**given, by_block=True)[0] == 3).all()
    given["q"][0, 0, given["drafts"][0, 0]] = 0.0
    for by_block in (True, False):
        assert ops.verify(**given, by_block=by_block)[0][0] == 0 or by_block
    assert torch.equal(
        ops.verify(**given, by_block=True)[0], reference_sampling.verify(**given, by_block=True)[0]
    )


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniforms_draw_tokens_that_p_has(uniform: float) -> None:
    given = blocks(6, 0, 100, 2, 0.0)
    given["scores"][:, [0, 31, 32, 99]] = -INF
    given["uniforms"].fill_(uniform)
    _, tokens = ops.verify(**given, by_block=False)
    assert (tokens == (1 if uniform == 0 else 98)).all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("drafts", torch.zeros(6, 3, dtype=torch.int32)),
        ("lengths", torch.zeros(5, dtype=torch.int64)),
        ("q", torch.zeros(6, 3, 39)),
        ("uniforms", torch.zeros(6, 3, dtype=torch.float64)),
        ("scores", torch.zeros(40)),
    ],
)
def test_verify_refuses_what_does_not_fit(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=name):
        ops.verify(**blocks(6, 3, 40, 1, 0.5) | {name: wrong}, by_block=True)


def test_combine_refuses_what_does_not_fit() -> None:
    members, weights = inputs(3, 20, 2)
    given = settings(3)
    with pytest.raises(ValueError, match="there must be a member"):
        ops.combine([], weights, **given)
    with pytest.raises(ValueError, match=r"weights must be float32 \[3, 1\], got float32 \[3, 2\]"):
        ops.combine(members[:1], weights, **given)
    with pytest.raises(ValueError, match=r"member 1 must be float32 \[3, 20\], got float64"):
        ops.combine([members[0], members[1].double()], weights, **given)
    with pytest.raises(ValueError, match="keys must be int64"):
        ops.combine(members, weights, **given | {"keys": torch.zeros(3)})
