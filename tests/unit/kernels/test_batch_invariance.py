"""Bit for bit: a row's logits are those of its sequence run alone, token by token, on one thread.

Random ragged batches: any chunking, order of sequences, block tables, wanted rows, rejected tokens in between, thread
counts, and KV memory full of NaN where nothing was written.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_kernels import BLOCK_TOKENS, TINY_SHAPES, Running, executor, load_plan, pool, run_alone
from torch import Tensor

from paceline.kernels.cpu.drafting import Draw
from paceline.kernels.cpu.executor import Span
from paceline.kernels.cpu.library import Isa
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import FORMATS

NAN_BYTE = 255
SHAPES = list(TINY_SHAPES)


class Crowd:
    """Runs sequences together in random pieces and notes each position's logits.

    Args:
        rng: all choices.
        plan, isa, kv_dtype: what runs.
        texts: token ids per sequence.
    """

    def __init__(
        self, rng: random.Random, plan: DecoderPlan, isa: Isa, kv_dtype: torch.dtype, texts: list[list[int]]
    ) -> None:
        self._rng, self._vocab = rng, plan.vocab
        needed = [-(-(len(text) + 8) // BLOCK_TOKENS) for text in texts]
        numbers = list(range(sum(needed) + 3))
        rng.shuffle(numbers)
        self.running = [
            Running(text, [numbers.pop() for _ in range(n)]) for text, n in zip(texts, needed, strict=True)
        ]
        self._executor = executor(
            plan, pool(isa, rng.randint(1, 3)), kv_dtype, num_blocks=sum(needed) + 3, fill=NAN_BYTE
        )
        self.logits: list[list[Tensor | None]] = [[None] * len(text) for text in texts]

    def step(self) -> None:
        """One batch: a piece of some sequences, each perhaps with tokens behind it that will not stay."""
        left = [s for s in self.running if s.done < len(s.tokens)]
        chosen = self._rng.sample(left, self._rng.randint(1, len(left)))
        tokens: list[int] = []
        spans, rows = [], []
        for s in chosen:
            count = min(self._rng.choice([1, 1, 2, 3, 5, 17, 40]), len(s.tokens) - s.done)
            rejected = [self._rng.randrange(self._vocab) for _ in range(self._rng.choice([0, 0, 0, 1, 4, 8]))]
            spans.append((len(tokens), count + len(rejected), s.done, s.table))
            rows += [(s, s.done + i, len(tokens) + i) for i in range(count)]
            tokens += s.tokens[s.done : s.done + count] + rejected
            s.done += count
        self._rng.shuffle(rows)
        got = self._executor.forward(tokens, spans, [row for _, _, row in rows])
        for (s, position, _), line in zip(rows, got, strict=True):
            self.logits[self.running.index(s)][position] = line


def texts(rng: random.Random, longest: int) -> list[list[int]]:
    return [[rng.randrange(300) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(1, 6))]


def check(seed: int, plan: DecoderPlan, isa: Isa, kv_dtype: torch.dtype, longest: int) -> None:
    rng = random.Random(seed)
    crowd = Crowd(rng, plan, isa, kv_dtype, texts(rng, longest))
    while any(s.done < len(s.tokens) for s in crowd.running):
        crowd.step()
    for s, got in zip(crowd.running, crowd.logits, strict=True):
        alone = run_alone(plan, pool(isa, 1), kv_dtype, s.tokens)
        assert torch.isfinite(alone).all()
        assert alone.std() > 1
        together = torch.stack([line for line in got if line is not None])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES), half=st.booleans())
def test_logits_do_not_depend_on_the_batch(isa, format, tiny_checkpoint, seed, shape, half):
    arch, overrides = TINY_SHAPES[shape]
    plan = load_plan(tiny_checkpoint(arch, **overrides), format)
    check(seed, plan, isa, torch.bfloat16 if half else torch.float32, longest=60)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(isa, shape, tiny_checkpoint):
    arch, overrides = TINY_SHAPES[shape]
    check(SHAPES.index(shape), load_plan(tiny_checkpoint(arch, **overrides), "int8"), isa, torch.bfloat16, 40)


@pytest.mark.parametrize("shape", ["llama", "mistral"])
def test_long_sequences(isa, shape, tiny_checkpoint):
    arch, overrides = TINY_SHAPES[shape]
    check(3, load_plan(tiny_checkpoint(arch, **overrides), "int8"), isa, torch.bfloat16, 400)


def test_a_prefix_written_by_another_sequence_gives_the_same(isa, tiny_checkpoint):
    """What the prefix cache does: blocks in two tables."""
    plan = load_plan(tiny_checkpoint("llama"), "int8")
    rng = random.Random(5)
    prefix, tails = [rng.randrange(300) for _ in range(32)], [[7, 8, 9], [10, 11, 12, 13]]
    ex = executor(plan, pool(isa), torch.bfloat16, num_blocks=4, fill=NAN_BYTE)
    ex.forward(prefix, [(0, 32, 0, [2, 0])], [])
    got = ex.forward([*tails[0], *tails[1]], [(0, 3, 32, [2, 0, 3]), (3, 4, 32, [2, 0, 1])], range(7))
    alone = [run_alone(plan, pool(isa), torch.bfloat16, prefix + tail)[32:] for tail in tails]
    assert torch.equal(got, torch.cat(alone))


def greedy_chain(plan: DecoderPlan, isa: Isa, tokens: list[int], length: int) -> list[int]:
    """The tokens that greedy steps append, each from a run of its own."""
    out = list(tokens)
    for _ in range(length):
        out.append(int(run_alone(plan, pool(isa, 1), torch.bfloat16, out, chunk=len(out))[-1].argmax()))
    return out[len(tokens) :]


@pytest.mark.parametrize("seed", range(4))
def test_native_drafting_equals_greedy_steps_and_leaves_their_cache(isa, seed, tiny_checkpoint):
    plan = load_plan(tiny_checkpoint("mistral"), "int8")
    rng = random.Random(seed)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(5)]
    lengths = {i: rng.randint(1, 9) for i in rng.sample(range(5), 4)}  # one only prefills
    ex = executor(plan, pool(isa, rng.randint(1, 3)), torch.bfloat16, num_blocks=15, fill=NAN_BYTE)
    tables = [rng.sample(range(3 * i, 3 * i + 3), 3) for i in range(5)]
    spans: list[Span] = []
    flat: list[int] = []
    for prompt, table in zip(prompts, tables, strict=True):
        spans.append((len(flat), len(prompt), 0, table))
        flat += prompt
    last_rows = [spans[i][0] + spans[i][1] - 1 for i in lengths]
    drafts = [d.tokens for d in ex.draft(flat, spans, last_rows, [Draw(*wish) for wish in lengths.items()])]
    for (i, length), got in zip(lengths.items(), drafts, strict=True):
        assert got == greedy_chain(plan, isa, prompts[i], length)
        whole = prompts[i] + got
        next_logits = ex.forward(whole[-1:], [(0, 1, len(whole) - 1, tables[i])], [0])
        assert torch.equal(next_logits, run_alone(plan, pool(isa, 1), torch.bfloat16, whole)[-1:])
    assert len({tuple(draft) for draft in drafts}) == 4
    untouched = next(i for i in range(5) if i not in lengths)
    tail = ex.forward([5], [(0, 1, len(prompts[untouched]), tables[untouched])], [0])
    assert torch.equal(tail, run_alone(plan, pool(isa, 1), torch.bfloat16, [*prompts[untouched], 5])[-1:])


def test_other_tokens_do_change_the_logits(isa, tiny_checkpoint):
    """The equality above is not that of a model that ignores its context."""
    plan = load_plan(tiny_checkpoint("llama"), "int8")
    one = run_alone(plan, pool(isa), torch.bfloat16, [5, 6, 7, 8])
    other = run_alone(plan, pool(isa), torch.bfloat16, [9, 6, 7, 8])
    assert ((one - other).abs().amax(-1) > 0.1).all()
