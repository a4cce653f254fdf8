"""The adaptive policy in the engine: the text stays, the draft's KV is computed only where it drafts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import NO_DRAFT, Recorder, ids, request, run, spec, submit, table_engine, tiny_engine, tokens
from policies import Timeless, with_policy

from paceline.server.config.schema import SpeculationConfig
from paceline.server.decoding.policy import AdaptivePolicy, Candidate, Decision, History, Option, StepWork
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.request import SpeculationParams
from paceline.server.errors import InvalidRequestError


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 300) for _ in range(rng.randint(3, 60))] for _ in range(count)]


class Erratic:
    """A policy that chooses lengths and sources by chance: what it may do, the adaptive one may do."""

    chooses_source = True

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self.sources: set[str] = set()

    def resting(self, histories: Any) -> list[Decision] | None:
        return [Decision(reason="batch_cost") for _ in histories] if self._rng.random() < 0.2 else None

    def decide(self, candidates: Any) -> list[Decision]:
        return [self._decide(c) for c in candidates]

    def _decide(self, candidate: Candidate) -> Decision:
        length = self._rng.randint(0, candidate.limit)
        if not length or not candidate.options:
            return Decision(reason="low_acceptance")
        option = self._rng.choice(candidate.options)
        self.sources.add(option.source)
        return Decision(length, option)

    def on_block(self, history: History, option: Option, drafted: int, accepted: int) -> None: ...

    def on_step(self, work: StepWork) -> None: ...


@pytest.fixture(scope="session")
def near(tiny_checkpoint: Any) -> Path:
    folder: Path = tiny_checkpoint("llama", perturb=0.02)
    return folder


@pytest.mark.parametrize("which", ["adaptive", "erratic"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.95}])
def test_greedy_and_seeded_text_is_the_same_under_any_policy(which, sampling, tiny_checkpoint, near):
    target, recorder = tiny_checkpoint("llama"), Recorder()
    asked = [{"prompt": p, "max_tokens": 40, **sampling} for p in prompts(8)]
    expected = tokens(tiny_engine(spec(target)), *(request(**a) for a in asked))
    engine = tiny_engine(
        spec(target, draft=near, max_draft_tokens=5, policy="adaptive"),
        observer=recorder,
        max_batch_tokens=40,
    )
    with_policy(engine, Erratic() if which == "erratic" else Timeless())
    for _ in ("cold", "warm"):
        assert tokens(engine, *(request(**a) for a in asked)) == expected
    assert sum(n for s in recorder.steps for n in s.drafted_per_block) > 8
    assert engine.kv_usage() == 0


def test_every_source_is_used_and_kv_stays_right_through_stops_and_starts(tiny_checkpoint, near):
    target, policy = tiny_checkpoint("llama"), Erratic(3)
    asked: list[dict[str, Any]] = [
        {"prompt": [7, 8, 9] * 6, "max_tokens": 60, "ignore_eos": True} for _ in range(3)
    ]
    expected = tokens(tiny_engine(spec(target)), *(request(**a) for a in asked))
    recorder = Recorder()
    engine = with_policy(
        tiny_engine(
            spec(target, draft=near, max_draft_tokens=4),
            observer=recorder,
            kv_cache_gib=17 * 16 * 512 / 2**30,  # 17 blocks: the targets' 15 and little more
        ),
        policy,
    )
    assert tokens(engine, *(request(**a) for a in asked)) == expected
    assert policy.sources == {near.name, "ngram"}
    assert "no_room" in {reason for s in recorder.steps for reason in s.disabled}
    assert engine.kv_usage() == 0


def test_a_sequence_that_never_drafts_has_no_draft_kv(tiny_checkpoint, near, monkeypatch):
    class Never(Erratic):
        def _decide(self, candidate: Candidate) -> Decision:
            return Decision(reason="low_acceptance")

    def refuse(*_: Any) -> None:
        raise AssertionError("the draft model ran")

    monkeypatch.setattr(DraftModelProposer, "propose", refuse)
    recorder = Recorder()
    engine = with_policy(tiny_engine(spec(tiny_checkpoint("llama"), draft=near), observer=recorder), Never())
    asked = request(prompts(1)[0] * 3, max_tokens=20, ignore_eos=True)
    submit(engine, asked)
    [sequence] = engine._open[asked.id]
    while engine.has_work:
        engine.step()
        assert sequence.draft is not None
        assert sequence.draft.blocks == []
    assert [r for s in recorder.steps for r in s.disabled] == ["low_acceptance"] * 19


def test_the_draft_catches_up_when_drafting_starts_again(tiny_checkpoint):
    """With the target as its own draft every token is accepted, if the draft's KV is right after each pause."""

    class Pauses(Erratic):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def _decide(self, candidate: Candidate) -> Decision:
            self.steps += 1
            drafts = self.steps % 7 == 0 and candidate.limit >= 3
            return Decision(3, candidate.options[0]) if drafts else Decision(reason="catch_up")

    target, recorder = tiny_checkpoint("llama"), Recorder()
    engine = with_policy(
        tiny_engine(spec(target, draft=target), observer=recorder, max_batch_tokens=16), Pauses()
    )
    run(engine, request(prompts(1, seed=4)[0][:12], max_tokens=100, ignore_eos=True))
    accepted = [a for s in recorder.steps for a in s.accepted_per_block]
    assert len(accepted) > 5
    assert set(accepted) == {3}


def test_a_hopeless_draft_is_soon_left_alone_and_the_reasons_are_told(tiny_checkpoint):
    recorder, wide = Recorder(), tiny_checkpoint("llama", seed=5, num_hidden_layers=8)
    engine = tiny_engine(
        spec(tiny_checkpoint("llama"), draft=wide, policy="adaptive", ngram=False), observer=recorder
    )
    run(engine, *(request(p, max_tokens=150, ignore_eos=True) for p in prompts(4)))
    late = recorder.steps[-50:]
    assert sum(n for s in late for n in s.drafted_per_block) < 20
    reasons = [reason for s in late for reason in s.disabled]
    assert set(reasons) <= {"low_acceptance", "batch_cost", "catch_up"}
    assert len(reasons) > 100


def test_a_request_that_wants_none_and_ngrams_without_a_match_are_told(tiny_checkpoint):
    recorder = Recorder()
    engine = tiny_engine(spec(tiny_checkpoint("llama"), draft="ngram"), observer=recorder)
    run(engine, request([5, 6, 7], max_tokens=6, ignore_eos=True, speculation=NO_DRAFT))
    assert [r for s in recorder.steps for r in s.disabled] == ["request"] * 5
    recorder.steps.clear()
    run(engine, request([5, 6, 7], max_tokens=3, ignore_eos=True))
    assert [r for s in recorder.steps for r in s.disabled][:1] == ["no_match"]
    plain = Recorder()
    run(tiny_engine(spec(tiny_checkpoint("llama")), observer=plain), request([5, 6, 7]))
    assert not [r for s in plain.steps for r in s.disabled]


def tables() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    target = rng.normal(size=(6, 6, 6)) * 1.3
    return target, target + rng.normal(size=target.shape) * 1.2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lenience_accepts_more_and_one_is_exact(temperature):
    target, draft = tables()

    def outcome(lenience: float, rule: str = "token") -> tuple[list[list[int]], int, int]:
        recorder = Recorder()
        engine = table_engine(
            target, draft, max_draft_tokens=3, rule=rule, min_lenience=0.1, observer=recorder
        )
        wish = SpeculationParams(lenience=lenience)
        asked = [request([0, i], max_tokens=60, temperature=temperature, speculation=wish) for i in range(6)]
        texts = [ids(choices[0]) for choices in run(engine, *asked)]
        blocks = [
            b for s in recorder.steps for b in zip(s.accepted_per_block, s.drafted_per_block, strict=True)
        ]
        return texts, sum(a for a, _ in blocks), sum(n for _, n in blocks)

    default = table_engine(target, draft, max_draft_tokens=3)
    plain = [request([0, i], max_tokens=60, temperature=temperature) for i in range(6)]
    exact, accepted, drafted = outcome(1.0)
    assert exact == tokens(default, *plain)
    lenient, more, of = outcome(0.3)
    assert more / of > 1.1 * accepted / drafted
    assert lenient != exact
    assert outcome(0.3, "block")[0] == lenient


def test_lenience_is_refused_where_the_model_or_the_seed_rules_it_out(tiny_checkpoint):
    strict = tiny_engine(spec(tiny_checkpoint("llama"), draft="ngram"))
    lax = tiny_engine(spec(tiny_checkpoint("llama"), draft="ngram", min_lenience=0.5))
    half, third = SpeculationParams(lenience=0.5), SpeculationParams(lenience=0.3)
    with pytest.raises(InvalidRequestError, match=r"'m' is exact"):
        strict.check(request([5], speculation=half))
    lax.check(request([5], speculation=half))
    with pytest.raises(InvalidRequestError, match=r"allows 0\.5 at the least"):
        lax.check(request([5], speculation=third))
    with pytest.raises(InvalidRequestError, match="seed"):
        lax.check(request([5], speculation=half, seed=1))


def test_adaptive_is_the_default(tiny_checkpoint):
    assert SpeculationConfig().policy == "adaptive"
    engine = tiny_engine(spec(tiny_checkpoint("llama"), draft="ngram", policy="adaptive"))
    assert isinstance(engine._models["m"].policy, AdaptivePolicy)


def test_a_lone_sequence_gets_through_where_only_its_target_fits(tiny_checkpoint, near):
    """The draft gives way; preempting the sequence itself would start over for ever."""
    for policy in ("fixed", "adaptive"):
        engine = tiny_engine(
            spec(tiny_checkpoint("llama"), draft=near, policy=policy), kv_cache_gib=6 * 16 * 512 / 2**30
        )
        submit(engine, request([7, 8, 9], max_tokens=90, ignore_eos=True))
        events = []
        for _ in range(200):
            events += engine.step()
        assert sum(len(event.token_ids) for _, event in events) == 90
        assert engine.kv_usage() == 0
