"""Models that go forward in one call: each row's bits are those that it has alone, whatever goes beside it."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_kernels import BLOCK_TOKENS, counted_calls, executor, load_plan, pool, run_alone

from paceline.kernels.cpu.executor import MOST_TOGETHER, Executor, Prepared, forward_together
from paceline.kernels.cpu.library import Isa
from paceline.kernels.cpu.plan import DecoderPlan

Checkpoint = Callable[..., Path]
KV = torch.bfloat16


def plans(tiny_checkpoint: Checkpoint) -> list[DecoderPlan]:
    """Two layers each, of other widths, formats and vocabularies."""
    return [
        load_plan(tiny_checkpoint("llama"), "int8"),
        load_plan(tiny_checkpoint("qwen3", seed=4, vocab_size=352), "int8"),
        load_plan(
            tiny_checkpoint("qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=128), "bf16"
        ),
    ]


class Alone:
    """A sequence of one model, and what every position says when it runs alone."""

    def __init__(self, plan: DecoderPlan, isa: Isa, threads: int, rng: random.Random) -> None:
        self.tokens = [rng.randrange(300) for _ in range(rng.randint(3, 60))]
        self._table = list(range(-(-len(self.tokens) // BLOCK_TOKENS)))
        self.wanted = run_alone(plan, pool(isa, 1), KV, self.tokens)
        self._executor = executor(plan, pool(isa, threads), KV, num_blocks=len(self._table), fill=255)
        self.done = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done

    def prepare(self, count: int, wanted: list[int]) -> Prepared:
        part = self.tokens[self.done : self.done + count]
        prepared = self._executor.prepare(part, [(0, count, self.done, self._table)], wanted)
        self.done += count
        return prepared


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_each_has_the_bits_that_it_has_alone(
    isa: Isa, threads: int, seed: int, tiny_checkpoint: Checkpoint
) -> None:
    rng = random.Random(seed)
    models = [Alone(plan, isa, threads, rng) for plan in plans(tiny_checkpoint)]
    joined = 0
    while any(model.left for model in models):
        going = [model for model in models if model.left]
        joined += len(going) > 1
        counts = [rng.randint(1, min(17, model.left)) for model in going]
        # Prompts want nothing but their last row; a model may want no row at all.
        rows = [sorted(rng.sample(range(count), rng.randint(0, count))) for count in counts]
        starts = [model.done for model in going]
        forwards = [model.prepare(c, r) for model, c, r in zip(going, counts, rows, strict=True)]
        forward_together(forwards)
        for model, start, own, forward in zip(going, starts, rows, forwards, strict=True):
            expected = model.wanted[[start + row for row in own]]
            assert torch.equal(forward.logits, expected)
    assert joined


def test_more_than_go_in_one_call_go_in_several(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    plan = load_plan(tiny_checkpoint("llama"), "int8")
    models = [Alone(plan, "portable", 2, rng) for _ in range(MOST_TOGETHER + 2)]
    calls = counted_calls(monkeypatch)
    forwards = [model.prepare(3, [0, 1, 2]) for model in models]
    forward_together(forwards)
    assert calls == [MOST_TOGETHER, 2]
    for model, forward in zip(models, forwards, strict=True):
        assert torch.equal(forward.logits, model.wanted[:3])


def test_models_of_other_depths_are_not_run(tiny_checkpoint: Checkpoint) -> None:
    deep, flat = (load_plan(tiny_checkpoint("qwen3", num_hidden_layers=n), "int8") for n in (2, 1))
    forwards = []
    for plan in (deep, flat):
        ex: Executor = executor(plan, pool("portable"), KV, num_blocks=1)
        forwards.append(ex.prepare([1, 2], [(0, 2, 0, [0])], [1]))
    with pytest.raises(AssertionError, match="-3"):
        forward_together(forwards)


def test_executors_of_other_pools_are_not_run(tiny_checkpoint: Checkpoint) -> None:
    plan = load_plan(tiny_checkpoint("llama"), "int8")
    forwards = [
        executor(plan, pool("portable", n), KV, num_blocks=1).prepare([1], [(0, 1, 0, [0])], [0])
        for n in (1, 2)
    ]
    with pytest.raises(AssertionError, match="pools"):
        forward_together([forwards[0], replace(forwards[1])])
