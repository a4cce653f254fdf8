"""Native draft blocks choose as the sampler does: step by step, from the same logits, penalties and noise.

The oracle forwards one row at a time and lets ``decoding.sampler`` choose among the proposable ids.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_kernels import executor, load_plan, pool
from torch import Tensor

from paceline.kernels.cpu.drafting import Drafted
from paceline.kernels.cpu.executor import Executor, Span
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.decoding.draws import DrawMaker
from paceline.server.decoding.noise import gumbel
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import probabilities, process
from paceline.server.engine.request import SamplingParams
from paceline.server.engine.runner import spread

VOCAB = 300
#: Token ids of a restricted vocabulary.
IDS = sorted(random.Random(5).sample(range(VOCAB), 120))
PROMPT = [5, 9, 200, 7, 31, 9]
LENGTH = 5

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "next to greedy": {"temperature": 1e-4},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6, "temperature": 0.8},
    "top_k, top_p": {"top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "all of it": {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.9},
    "min_p": {"min_p": 0.1},
    "penalties": {
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.5,
        "logit_bias": {IDS[3]: 3.0, IDS[9]: -4.0, 299: 1.0},
    },
    "min_tokens": {"min_tokens": 50, "logit_bias": {IDS[60]: 2.0}},
}
MODES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"seed": -3}, "sampled": {}}


def setting(folder, isa, ids: list[int] | None) -> tuple[DecoderPlan, Executor]:
    plan = load_plan(folder, "fp32")
    if ids is not None:
        head = pool(isa).pack(plan.head.unpack()[ids], "fp32")
        plan = replace(plan, head=head, vocab_ids=torch.tensor(ids, dtype=torch.int32))
    return plan, executor(plan, pool(isa, 2), torch.float32, num_blocks=4)


def step_by_step(
    plan: DecoderPlan, ex: Executor, sampling: SamplingParams, uniforms: Tensor, columns: int
) -> Drafted:
    """The same block, by one forward and one choice of the sampler for each token."""
    logits = ex.forward(PROMPT, [(0, len(PROMPT), 0, [3])], [len(PROMPT) - 1])
    drafted: list[int] = []
    probs = []
    for step in range(LENGTH):
        logits[:, columns:] = float("-inf")
        row = row_after(sampling, drafted)
        scores = process(spread(logits, plan.vocab_ids, VOCAB), [row])
        [q] = probabilities(scores, [row])
        if sampling.temperature == 0:
            token = int(scores.argmax())
        elif sampling.seed is not None:
            noise = gumbel([sampling.seed], [row.choice], [row.position], VOCAB, "cpu")
            token = int((scores + noise).argmax())
        else:
            token = int(torch.searchsorted(q.double().cumsum(0), uniforms[step], right=True))
        drafted.append(token)
        probs.append(q)
        place: list[Span] = [(0, 1, len(PROMPT) + step, [3])]
        logits = ex.forward([token], place, [0])
    return Drafted(drafted, torch.stack(probs))


def row_after(sampling: SamplingParams, drafted: list[int]) -> Row:
    return Row(sampling, PROMPT[:4], [*PROMPT[4:], *drafted], (IDS[60], 4), 2, len(PROMPT) + len(drafted))


@pytest.mark.parametrize("ids", [None, IDS], ids=["all ids", "some ids"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_a_block_is_chosen_as_the_sampler_chooses(isa, way, mode, ids, tiny_checkpoint):
    plan, ex = setting(tiny_checkpoint("llama"), isa, ids)
    sampling = SamplingParams(**{**WAYS[way], **MODES[mode]})
    columns = plan.head.out_features - 10  # as if the target had fewer ids than the draft
    generator = torch.Generator().manual_seed(1)
    row = row_after(sampling, [])
    [draw] = DrawMaker(plan.vocab_ids, columns).draws([row], [(0, LENGTH)], generator)
    uniforms = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = step_by_step(plan, ex, sampling, uniforms, columns)
    [got] = ex.draft(PROMPT, [(0, len(PROMPT), 0, [1])], [len(PROMPT) - 1], [draw], columns=columns)
    assert got.tokens == expected.tokens
    if mode != "sampled":
        assert got.probs is None
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
        return
    assert got.probs is not None
    assert expected.probs is not None
    q = torch.zeros(LENGTH, VOCAB)
    at = torch.arange(columns) if ids is None else torch.tensor(ids[:columns])
    q[:, at] = got.probs
    assert torch.allclose(q, expected.probs, atol=1e-5)
    assert ((q > 0) == (expected.probs > 0)).all()


def test_the_ways_differ(isa, tiny_checkpoint):
    """Otherwise the test above would not see an ignored parameter."""
    seen = {}
    for way, parameters in WAYS.items():
        plan, ex = setting(tiny_checkpoint("llama"), isa, IDS)
        uniforms = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        block = step_by_step(plan, ex, SamplingParams(**parameters), uniforms, len(IDS))
        assert block.probs is not None
        seen[way] = block.probs[0]
    for way, probs in seen.items():
        others = [torch.allclose(probs, other, atol=1e-4) for name, other in seen.items() if name != way]
        assert not any(others), way


def test_drafts_of_a_crowd_do_not_depend_on_each_other(isa, tiny_checkpoint):
    """All modes in one call, of unequal lengths, on several threads."""
    _, ex = setting(tiny_checkpoint("llama"), isa, None)
    ways = [
        SamplingParams(temperature=0.0, frequency_penalty=1.0),
        SamplingParams(seed=4, top_p=0.8),
        SamplingParams(top_k=12, repetition_penalty=1.3),
        SamplingParams(temperature=1.2, min_p=0.05),
    ]
    rows = [row_after(sampling, []) for sampling in ways]
    wishes = [(i, 2 + i) for i in range(4)]
    draws = DrawMaker(None, VOCAB).draws(rows, wishes, torch.Generator().manual_seed(8))
    spans: list[Span] = [(6 * i, 6, 0, [i]) for i in range(4)]
    together = ex.draft(PROMPT * 4, spans, [5, 11, 17, 23], draws)
    for i, (draw, crowd) in enumerate(zip(draws, together, strict=True)):
        [alone] = ex.draft(PROMPT, [(0, 6, 0, [i])], [5], [replace(draw, sequence=0)])
        assert crowd.tokens == alone.tokens
        assert len(alone.tokens) == 2 + i
        if alone.probs is not None:
            assert crowd.probs is not None
            assert torch.equal(crowd.probs, alone.probs)
