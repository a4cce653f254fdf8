"""The engine's seam for offline measurement: which blocks are shown, with which p and q."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from engines import NO_DRAFT, request, run, table_engine
from statistics_helpers import Floats
from torch import Tensor

from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.request import Request, SpeculationStats, TokenEvent

VOCAB, LENGTH = 6, 3
TOKENS = 40


def table(seed: int) -> Floats:
    """Logits that depend on the current token alone, so that a block's own tokens say what p and q were."""
    rows = np.random.default_rng(seed).normal(0, 1.5, (VOCAB, VOCAB))
    return np.broadcast_to(rows, (VOCAB, VOCAB, VOCAB)).copy()


TARGET, DRAFT = table(0), table(1)


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    result: Floats = weights / weights.sum(-1, keepdims=True)
    return result


def overlap(temperature: float) -> Floats:
    """sum_v min(p, q) after each current token, float64 [V]."""
    p, q = softmax(TARGET[0] / temperature), softmax(DRAFT[0] / temperature)
    result: Floats = np.minimum(p, q).sum(-1)
    return result


@dataclass
class Shown:
    request: Request
    source: str
    block: DraftBlock
    accepted: int
    scores: Tensor | None


class Keeper:
    """Keeps what it is shown, and hands it on."""

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        self.figures = BlockExaminer()
        self.figures.wants_overlaps = True

    def on_block(
        self, request: Request, source: str, block: DraftBlock, accepted: int, scores: Tensor | None
    ) -> None:
        self.shown.append(Shown(request, source, block, accepted, None if scores is None else scores.clone()))
        self.figures.on_block(request, source, block, accepted, scores)


def stats_of(events: list[TokenEvent]) -> SpeculationStats:
    stats = events[-1].speculation
    assert stats is not None
    return stats


def test_every_verified_block_is_shown_with_the_distributions_of_its_own_positions() -> None:
    """Mixed batches: greedy, sampled at two temperatures, seeded, without speculation."""
    keeper = Keeper()
    engine = table_engine(TARGET, DRAFT, max_draft_tokens=LENGTH, examiner=keeper)
    asked = [
        request([1, 2], max_tokens=TOKENS, temperature=0.0),
        request([2], max_tokens=TOKENS, temperature=1.0, speculation=NO_DRAFT),
        request([3, 1, 4], max_tokens=TOKENS, temperature=1.0),
        request([5], max_tokens=TOKENS, temperature=1.0, seed=7),
        request([4, 4], max_tokens=TOKENS, temperature=0.6),
    ]
    answers = run(engine, *asked)

    for one, (events,) in zip(asked, answers, strict=True):
        mine = [s for s in keeper.shown if s.request is one]
        stats = stats_of(events)
        assert len(mine) == stats.num_spec_steps
        assert sum(s.accepted for s in mine) == stats.num_accepted_draft_tokens
        assert sum(len(s.block.token_ids) for s in mine) == stats.num_draft_tokens
    assert not [s for s in keeper.shown if s.request is asked[1]]
    assert {s.source for s in keeper.shown} == {"draft"}
    for shown in (s for s in keeper.shown if s.request is asked[4]):
        assert shown.scores is not None
        assert len(shown.scores) == len(shown.block.token_ids) + 1
        for position, token in enumerate(shown.block.token_ids, 1):
            expected = softmax(TARGET[0][token] / 0.6)
            np.testing.assert_allclose(shown.scores[position].softmax(-1).numpy(), expected, atol=1e-6)


def test_overlaps_are_those_of_the_known_distributions() -> None:
    keeper = Keeper()
    engine = table_engine(TARGET, DRAFT, max_draft_tokens=LENGTH, examiner=keeper)
    asked = [request([1], max_tokens=TOKENS, temperature=t) for t in (1.0, 0.6)]
    run(engine, *asked)

    for one in asked:
        expected, checked = overlap(one.sampling.temperature), 0
        shown = [s for s in keeper.shown if s.request is one]
        blocks = keeper.figures.take(one.id)
        assert len(blocks) == len(shown)
        for seen, block in zip(shown, blocks, strict=True):
            assert block.overlaps is not None
            assert len(block.overlaps) == block.examined == min(seen.accepted + 1, len(seen.block.token_ids))
            assert np.isclose(block.overlaps[0], expected, atol=1e-6).any()
            for value, before in zip(block.overlaps[1:], seen.block.token_ids, strict=False):
                np.testing.assert_allclose(value, expected[before], atol=1e-6)
                checked += 1
        assert checked > 5
        assert keeper.figures.take(one.id) == ()


def test_a_draft_that_is_the_target_overlaps_wholly() -> None:
    keeper = Keeper()
    engine = table_engine(TARGET, TARGET, max_draft_tokens=LENGTH, examiner=keeper)
    asked = request([1], max_tokens=TOKENS, temperature=1.0)
    run(engine, asked)
    blocks = keeper.figures.take(asked.id)
    assert blocks
    assert all(block.accepted == block.drafted for block in blocks)
    np.testing.assert_allclose([value for b in blocks for value in b.overlaps or ()], 1.0, atol=1e-6)


def test_deterministic_proposals_are_one_hot_and_greedy_ones_match_or_not() -> None:
    """n-grams at T = 1: q is 1 for the drafted token, so that the overlap is p of it."""
    keeper = Keeper()
    engine = table_engine(TARGET, None, max_draft_tokens=LENGTH, examiner=keeper)
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    sampled = request(prompt, max_tokens=TOKENS, temperature=1.0)
    run(engine, sampled)
    p = softmax(TARGET[0])
    shown, blocks = list(keeper.shown), keeper.figures.take(sampled.id)
    assert blocks
    for seen, block in zip(shown, blocks, strict=True):
        tokens = seen.block.token_ids
        for position in range(1, block.examined):
            expected = p[tokens[position - 1], tokens[position]]
            np.testing.assert_allclose((block.overlaps or ())[position], expected, atol=1e-6)

    greedy = request(prompt, max_tokens=TOKENS, temperature=0.0)
    run(engine, greedy)
    for block in keeper.figures.take(greedy.id):
        assert block.overlaps == tuple([1.0] * block.accepted + [0.0] * (block.examined - block.accepted))


def test_what_is_unknown_or_not_wanted_is_not_computed() -> None:
    keeper = Keeper()
    engine = table_engine(TARGET, DRAFT, max_draft_tokens=LENGTH, examiner=keeper)
    seeded = request([1], max_tokens=TOKENS, temperature=1.0, seed=3)
    run(engine, seeded)
    keeper.figures.wants_overlaps = False
    sampled = request([1], max_tokens=TOKENS, temperature=1.0)
    run(engine, sampled)
    for one in (seeded, sampled):
        blocks = keeper.figures.take(one.id)
        assert blocks
        assert {block.overlaps for block in blocks} == {None}


def test_an_examiner_changes_no_output() -> None:
    asked: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 1.0}
    texts = []
    for examiner in (None, Keeper()):
        engine = table_engine(TARGET, DRAFT, max_draft_tokens=LENGTH, examiner=examiner)
        events = run(engine, request([1, 2], **asked), request([3], **asked))
        texts.append([[e.token_ids for e in choices[0]] for choices in events])
    assert texts[0] == texts[1]
