"""States that a target keeps in its blocks, and drafts that read them, on the native kernels.

The oracle is transformers; what the kernels promise bit for bit is compared with ``torch.equal``.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from feature_oracle import FeatureOracle, target_states
from native_drafts import write_feature_draft
from native_kernels import BLOCK_TOKENS, load_plan, pool
from torch import Tensor

from paceline.kernels.cpu.drafting import Draw
from paceline.kernels.cpu.executor import Executor, Span
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import FORMATS, Format
from paceline.server.models.checkpoint import open_checkpoint, read_json
from paceline.server.models.config import parse_model_config, restricted
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.plan import PlanBuilder
from paceline.server.models.tensors import CheckedTensors

RNG = random.Random(3)
TOKENS = [RNG.randrange(4, 300) for _ in range(45)]
IDS = list(range(2, 300, 3))


def keeping(
    plan: DecoderPlan, isa, kv_dtype=torch.float32, *, states: bool = True, blocks: int = 8
) -> Executor:
    """An executor over memory full of NaN."""
    width = 2 * len(plan.layers) * plan.kv_heads * plan.head_dim + (plan.hidden if states else 0)
    kv = torch.full((blocks, BLOCK_TOKENS * width * kv_dtype.itemsize), 255, dtype=torch.uint8)
    return Executor(plan, pool(isa), kv, kv_dtype=kv_dtype, block_tokens=BLOCK_TOKENS, keep_states=states)


def draft_plan(folder: Path, target: Path, format: Format) -> DecoderPlan:
    checkpoint = NativeCheckpoint(folder, open_checkpoint(target))
    config = restricted(parse_model_config(checkpoint.hf_config), checkpoint.draft_vocab)
    fetch = CheckedTensors(checkpoint, config)
    plan = PlanBuilder(config, fetch, pool("portable"), format, stored_int8=fetch.int8).build()
    return replace(plan, vocab_ids=checkpoint.draft_vocab)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_kept_states_are_those_of_the_final_norm_and_change_no_logits(
    isa, arch, kv_dtype, format, tiny_checkpoint
):
    folder = tiny_checkpoint(arch)
    plan, table = load_plan(folder, format), [5, 2, 7]
    ex, bare = keeping(plan, isa, kv_dtype), keeping(plan, isa, kv_dtype, states=False)
    for start, stop in ((0, 20), (20, 21), (21, 45)):
        span: list[Span] = [(0, stop - start, start, table)]
        wanted = [stop - start - 1, 0]
        out = torch.empty(2, plan.hidden)
        logits = ex.forward(TOKENS[start:stop], span, wanted, states=out)
        assert torch.equal(logits, bare.forward(TOKENS[start:stop], span, wanted))
        kept = ex.read_states([(0, 1, stop - 1, table), (1, 1, start, table)])
        assert torch.equal(kept, out.to(kv_dtype).float())
    states = ex.read_states([(0, 46, -1, table)])
    assert torch.equal(states[0], torch.zeros(plan.hidden))
    expected = target_states(folder, TOKENS)
    limit = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.2}[format] + (0.05 if kv_dtype is torch.bfloat16 else 0)
    assert (states[1:] - expected).abs().max() < limit * 4
    assert 0.5 < expected.std() < 2


def test_kept_states_do_not_depend_on_chunks_or_company(isa, tiny_checkpoint):
    plan = load_plan(tiny_checkpoint("llama"), "int8")
    alone, crowd = keeping(plan, isa, torch.bfloat16), keeping(plan, isa, torch.bfloat16)
    for i, token in enumerate(TOKENS):
        alone.forward([token], [(0, 1, i, [0, 1, 2])], [])
    other = TOKENS[::-1]
    crowd.forward(TOKENS[:30] + other[:9], [(0, 30, 0, [7, 3, 5]), (30, 9, 0, [1])], [3])
    crowd.forward(other[9:14] + TOKENS[30:], [(0, 5, 9, [1]), (5, 15, 30, [7, 3, 5])], [])
    expected = alone.read_states([(0, 45, 0, [0, 1, 2])])
    assert torch.equal(crowd.read_states([(0, 45, 0, [7, 3, 5])]), expected)
    assert torch.equal(
        crowd.read_states([(1, 3, 31, [7, 3, 5]), (0, 1, 44, [7, 3, 5])]), expected[[44, 31, 32, 33]]
    )


def features(hidden: int, rows: int = len(TOKENS)) -> Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("hidden", [64, 72])
def test_a_draft_that_reads_states_equals_transformers(
    isa, hidden, layers, format, tiny_checkpoint, tmp_path
):
    target = tiny_checkpoint("llama", hidden_size=hidden)
    folder = write_feature_draft(tmp_path / "draft", target, layers=layers, ids=IDS)
    plan, given = draft_plan(folder, target, format), features(hidden)
    assert (plan.final_norm, plan.layers[0].attention_norm) == (None, None)
    ex, states = keeping(plan, isa, states=False), torch.empty(len(TOKENS), hidden)
    logits = torch.cat(
        [
            ex.forward(
                TOKENS[at : at + 15],
                [(0, 15, at, [4, 1, 6])],
                range(15),
                features=given[at : at + 15],
                states=states[at : at + 15],
            )
            for at in (0, 15, 30)
        ]
    )
    expected_logits, expected_states = FeatureOracle(folder, target, format).rows(TOKENS, given)
    limit = {"fp32": 1e-4, "bf16": 1e-4, "int8": 0.2}[format]
    assert (logits - expected_logits).abs().max() < limit
    assert (states - expected_states).abs().max() < limit
    assert expected_logits.std() > 0.3


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_a_greedy_block_is_drafted_as_step_by_step(isa, format, ids, tiny_checkpoint, tmp_path):
    """Sequences of unequal lengths, one that only catches up; each row reads the state of the row before."""
    target = tiny_checkpoint("llama")
    folder = write_feature_draft(tmp_path / "draft", target, ids=ids)
    plan, given = draft_plan(folder, target, format), features(64, 18)
    spans: list[Span] = [(0, 9, 0, [0, 1]), (9, 4, 0, [2]), (13, 5, 0, [3, 4])]
    wishes = [(0, 3), (2, 6)]
    ex = keeping(plan, isa, torch.bfloat16, states=False)
    draws = [Draw(*wish) for wish in wishes]
    blocks = [d.tokens for d in ex.draft(TOKENS[:18], spans, [8, 17], draws, features=given)]

    ex = keeping(plan, isa, torch.bfloat16, states=False)
    states = torch.empty(2, 64)
    logits = ex.forward(TOKENS[:18], spans, [8, 17], features=given, states=states)
    for (index, length), block, row, state in zip(wishes, blocks, logits, states, strict=True):
        best, feature = row, state[None]
        for step in range(length):
            token = int(best.argmax()) if ids is None else ids[int(best.argmax())]
            assert block[step] == token
            _, count, _, table = spans[index]
            own = torch.empty(1, 64)
            place: list[Span] = [(0, 1, count + step, table)]
            best = ex.forward([token], place, [0], features=feature, states=own)[0]
            feature = own
    assert len({token for block in blocks for token in block}) > 3


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_draft_reads_the_states_that_its_target_kept(isa, kv_dtype, tiny_checkpoint, tmp_path):
    """As if they had been read first: from the start and from the middle, tables of both in any order."""
    folder = tiny_checkpoint("llama")
    plan = draft_plan(write_feature_draft(tmp_path / "draft", folder), folder, "fp32")
    target = keeping(load_plan(folder, "fp32"), isa, kv_dtype)
    kept = [[6, 1, 3], [5, 0]]
    target.forward(TOKENS + TOKENS[:20], [(0, 45, 0, kept[0]), (45, 20, 0, kept[1])], [])
    tokens, draws = TOKENS[30:] + TOKENS[:20], [Draw(0, 4), Draw(1, 3)]
    spans: list[Span] = [(0, 15, 30, [2, 0, 4]), (15, 20, 0, [1, 3])]
    first: list[Span] = [(0, 30, 0, [2, 0, 4])]
    blocks = []
    for native in (False, True):
        ex = keeping(plan, isa, kv_dtype, states=False)
        ex.forward(TOKENS[:30], first, [], features=target.read_states([(0, 30, -1, kept[0])]))
        read = target.read_states([(0, 15, 29, kept[0]), (15, 20, -1, kept[1])])
        given = {"kept": (target, kept)} if native else {"features": read}
        blocks.append(ex.draft(tokens, spans, [14, 34], draws, **given))
    assert blocks[0] == blocks[1]
    assert len({token for block in blocks[0] for token in block.tokens}) > 2


def test_configurations_say_whether_states_are_read(tiny_checkpoint, tmp_path):
    target = tiny_checkpoint("llama")
    folder = write_feature_draft(tmp_path / "draft", target)
    config = read_json(folder / "config.json") | {"architectures": ["LlamaForCausalLM"]}
    assert parse_model_config(config).reads_state
    assert not parse_model_config(read_json(target / "config.json")).reads_state
