"""Sampled output through ``Engine.step`` follows the target's distribution, and the check notices wrong engines.

Target and draft are lookup tables over six tokens whose logits depend on the last two tokens, read back through the
block tables. The joint distribution of three consecutive output tokens (the second to the fourth, so that blocks of
every length are in it) is compared with the exact one by chi-square. ``make study`` takes 200,000 samples a case and
prints the p-values, the ordinary suite a twentieth.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from campaign import size
from engines import Recorder, request, run, submit, table_engine
from statistics_helpers import Floats, joint_chi_square, joint_counts, joint_probabilities

import paceline.server.decoding.arithmetic as arithmetic_module
import paceline.server.decoding.verify as verify_module
import paceline.server.engine.draft_proposer as draft_module
import paceline.server.engine.engine as engine_module
import paceline.server.engine.steering as steering_module
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import probabilities, process
from paceline.server.decoding.verify import DraftBlock, Verdict
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.engine import Engine
from paceline.server.engine.proposers import make_row
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams

VOCAB, DEPTH = 6, 3
PROMPT = (0, 1, 2, 3, 1, 2)
SAMPLES = size(200_000)
PASSES, REJECTED = 1e-4, 1e-6

Record = Callable[[str, object], None]

WARPINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold, top_k, top_p": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "penalties": {
        "temperature": 1.2,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.4,
        "logit_bias": {2: 0.7, 4: -0.5},
        "min_p": 0.03,
    },
}


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(VOCAB, VOCAB, VOCAB)) * 1.3
    return target, target + rng.normal(size=target.shape) * 0.9


def steering_tables() -> tuple[np.ndarray, np.ndarray]:
    """Logits of an expert and an anti-expert."""
    rng = np.random.default_rng(9)
    anti_expert = rng.normal(size=(VOCAB, VOCAB, VOCAB))
    return anti_expert + rng.normal(size=anti_expert.shape) * 0.8, anti_expert


def exact_joint(target: np.ndarray, sampling: dict[str, Any]) -> Floats:
    """Probabilities of output tokens 2-4, summed over the first."""
    params = SamplingParams(**sampling)

    def next_probs(output: tuple[int, ...]) -> Floats:
        context = [*PROMPT, *output]
        logits = torch.tensor(target[context[-2], context[-1]], dtype=torch.float32)[None]
        row = Row(params, PROMPT, list(output), (), 0, len(context))
        return np.asarray(probabilities(process(logits, [row]), [row])[0].double().numpy())

    joint: Floats = joint_probabilities(next_probs, VOCAB, DEPTH + 1).sum(axis=0)
    return joint


def p_value(
    *,
    length: int,
    rule: str = "token",
    draft: str = "draft",
    warping: str = "plain",
    samples: int = SAMPLES,
    seeded: bool = False,
    draft_ids: Sequence[int] | None = None,
    reads_states: bool = False,
    alpha: float | None = None,
    min_lenience: float = 1.0,
) -> float:
    target, draft_table = tables()
    expert, anti_expert = steering_tables()
    sampling: dict[str, Any] = {"temperature": 1.0, **WARPINGS[warping]}
    engine = table_engine(
        target,
        draft_table,
        max_draft_tokens=length,
        rule=rule,
        seed=length,
        draft_ids=draft_ids,
        reads_states=reads_states,
        min_lenience=min_lenience,
        steering=None if alpha is None else (expert, anti_expert, alpha),
    )
    combined = target if alpha is None else target + alpha * (expert - anti_expert)
    wish = SpeculationParams(draft=draft, lenience=1.0)
    # Choices that have their tokens wait for the last of their request; seeds are to give choices of their own.
    choices = 8 if seeded else 1
    requests = [
        request(
            PROMPT,
            n=choices,
            max_tokens=DEPTH + 2 + length,
            speculation=wish,
            seed=number if seeded else None,
            **sampling,
        )
        for number in range(-(-samples // choices))
    ]
    outputs = first_tokens(engine, requests, DEPTH + 1)
    drawn = np.array([tokens[1:] for tokens in outputs][:samples])
    assert len(drawn) == samples
    return joint_chi_square(joint_counts(drawn, VOCAB), exact_joint(combined, sampling))


def first_tokens(engine: Engine, requests: Sequence[Request], count: int) -> list[list[int]]:
    """The first ``count`` tokens of every choice; requests are cancelled as soon as all of theirs are there."""
    outputs: dict[str, list[list[int]]] = {r.id: [[] for _ in range(r.n)] for r in requests}
    submit(engine, *requests)
    while engine.has_work:
        events = engine.step()
        for request_id, event in events:
            outputs[request_id][event.choice].extend(event.token_ids)
        for request_id in {name for name, _ in events}:
            if min(map(len, outputs[request_id])) >= count:
                engine.cancel(request_id)
    return [tokens[:count] for choices in outputs.values() for tokens in choices]


@pytest.mark.parametrize("warping", WARPINGS)
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_draft_model_keeps_the_distribution(length, rule, warping, record_property: Record):
    p = p_value(length=length, rule=rule, warping=warping)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


@pytest.mark.parametrize(
    ("rule", "warping", "seeded"),
    [("token", "penalties", False), ("block", "cold, top_k, top_p", False), ("block", "plain", True)],
)
def test_ngram_and_seeded_requests_keep_the_distribution(rule, warping, seeded, record_property: Record):
    draft = "draft" if seeded else "ngram"
    p = p_value(length=3, rule=rule, warping=warping, draft=draft, seeded=seeded)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


@pytest.mark.parametrize("warping", ["plain", "penalties"])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("draft_ids", [(4,), (0, 2, 5)])
def test_a_restricted_draft_keeps_the_distribution(draft_ids, rule, warping, record_property: Record):
    p = p_value(length=3, rule=rule, warping=warping, draft_ids=draft_ids)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


@pytest.mark.parametrize("draft_ids", [None, (0, 2, 5)])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_draft_that_reads_states_keeps_the_distribution(draft_ids, rule, record_property: Record):
    p = p_value(length=3, rule=rule, draft_ids=draft_ids, reads_states=True)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


@pytest.mark.parametrize(
    ("draft", "rule", "warping"),
    [
        ("expert", "token", "plain"),
        ("expert", "block", "plain"),
        ("expert", "block", "cold, top_k, top_p"),
        ("expert", "token", "penalties"),
        ("draft", "token", "plain"),
        ("draft", "block", "penalties"),
    ],
)
def test_a_steered_model_keeps_the_distribution_of_the_combination(
    draft, rule, warping, record_property: Record
):
    """With the expert as draft and with another one; lenience is allowed and asked for at 1, which is exact."""
    p = p_value(length=3, draft=draft, rule=rule, warping=warping, alpha=1.3, min_lenience=0.1)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


@pytest.mark.parametrize("alpha", [0.4, 2.5])
def test_seeded_steered_requests_keep_the_distribution(alpha, record_property: Record):
    p = p_value(length=3, draft="expert", seeded=True, alpha=alpha)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


def test_a_draft_that_reads_states_reads_the_right_ones():
    """It is the target itself, with the token before from the features: not one proposal is rejected."""
    target, _ = tables()
    recorder = Recorder()
    engine = table_engine(target, target, max_draft_tokens=3, reads_states=True, observer=recorder)
    asked = [request(PROMPT[:n], max_tokens=40, temperature=t, n=4) for n in (1, 6) for t in (0.0, 1.0)]
    run(engine, *asked)
    drafted = sum(n for step in recorder.steps for n in step.drafted_per_block)
    assert drafted > 300
    assert sum(n for step in recorder.steps for n in step.accepted_per_block) == drafted


def _residual_from_p(p, q, accepted, scale):
    index = torch.arange(p.shape[0])
    return p[index, accepted]


def _no_bonus(p, q, accepted, scale):
    """Past a block accepted whole, the next token is taken from the last residual instead of from p."""
    index, last = torch.arange(p.shape[0]), q.shape[1] - 1
    residual = (p[index, accepted.clamp(max=last)] - q[index, accepted.clamp(max=last)]).clamp(min=0)
    empty = residual.sum(1, keepdim=True) == 0
    residual = torch.where(empty, p[index, accepted], residual)
    return residual / residual.sum(1, keepdim=True)


def _unwarped(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    return scores.softmax(-1).pow(0.5) / scores.softmax(-1).pow(0.5).sum(-1, keepdim=True)


def _stale(sequence, drafted):
    return replace(make_row(sequence, drafted), output_ids=make_row(sequence, ()).output_ids)


def _drop_unlikely(propose):
    def mutant(self, items, generator):
        """Cut each block before the first drawn token of low confidence."""
        blocks = []
        for block in propose(self, items, generator):
            kept = 0
            while kept < len(block.token_ids) and block.probs[kept, block.token_ids[kept]] >= 0.3:
                kept += 1
            blocks.append(DraftBlock(block.token_ids[:kept], block.probs[:kept] if kept else None))
        return blocks

    return mutant


def _renormalised(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """A draft that says it could have drawn what it cannot."""
    return (scores.softmax(-1) + 0.1) / (1 + 0.1 * scores.shape[1])


def _uncombined(members, weights):
    return members[0].clone()


def _last_said(track, logits):
    """What the expert said when it drafted is taken one position late."""
    drafted = track.drafted_logits
    track.drafted_logits = None
    return logits if drafted is None else torch.cat([logits, drafted])


MUTANTS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "residual taken from p": (verify_module, "_following", _residual_from_p, {}),
    "no bonus token": (verify_module, "_following", _no_bonus, {"length": 2}),
    "unwarped q": (draft_module, "probabilities", _unwarped, {"warping": "cold, top_k, top_p"}),
    "q spread over ids that are never drawn": (
        draft_module,
        "probabilities",
        _renormalised,
        {"draft_ids": (0, 2, 5)},
    ),
    "stale penalties": (engine_module, "make_row", _stale, {"warping": "penalties"}),
    "steering left out": (arithmetic_module, "combine", _uncombined, {"alpha": 1.3, "draft": "expert"}),
    "expert's logits at the wrong positions": (
        steering_module,
        "_joined",
        _last_said,
        {"alpha": 1.3, "draft": "expert"},
    ),
    "dropping a drawn low-confidence token": (
        DraftModelProposer,
        "propose",
        _drop_unlikely(DraftModelProposer.propose),
        {},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_same_check_rejects_wrong_engines(name, monkeypatch, record_property: Record):
    owner, attribute, mutant, case = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    p = p_value(**{"length": 3, "samples": 10_000, **case})
    record_property("p", f"{p:.1e}")
    assert p < REJECTED


def test_a_wrong_verdict_in_the_coupled_rule_is_rejected(monkeypatch):
    """Accepting a draft token that the target did not choose."""
    real = verify_module.match_prefix

    def lenient(outputs, drafts):
        verdict = real(outputs, drafts)
        return Verdict(len(drafts), outputs[-1]) if verdict.accepted else verdict

    monkeypatch.setattr(verify_module, "match_prefix", lenient)
    assert p_value(length=3, seeded=True, samples=10_000) < REJECTED
