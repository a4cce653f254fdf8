"""The engine on the native kernels in int8: bit for bit the same output, logprobs included, whatever runs beside it.

Greedy and seeded, with every kind of draft against none, alone against in a crowd, prefix cache cold and warm, chunked
prompts, preempted, on several threads.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import Recorder, request, run, spec, tiny_engine
from native_kernels import require_native

from paceline.kernels.cpu.library import ISAS
from paceline.server.engine.request import Request, TokenEvent

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 77, "top_k": 50, "top_p": 0.95}
GREEDY: dict[str, Any] = {"repetition_penalty": 1.1}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_KERNELS", "native")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "packed-cache"))


def prompts(count: int = 8) -> list[list[int]]:
    rng = random.Random(21)
    return [[rng.randrange(4, 300) for _ in range(rng.randint(1, 70))] for _ in range(count)]


def asked(which: Sequence[int] = range(8), **extra: Any) -> list[Request]:
    """Eight requests, odd ones seeded and even ones greedy, with logprobs of their own tokens and the best three."""
    texts = prompts()
    return [
        request(texts[i], max_tokens=40, logprobs=3, **(SEEDED if i % 2 else GREEDY), **extra) for i in which
    ]


def output(events: list[TokenEvent]) -> list[Any]:
    """Ids with their logprobs; floats are compared exactly."""
    return [entry for event in events for entry in zip(event.token_ids, event.logprobs or (), strict=True)]


def outputs(engine: Any, requests: list[Request]) -> list[list[Any]]:
    return [output(choices[0]) for choices in run(engine, *requests)]


@pytest.fixture(scope="session")
def target(tiny_checkpoint: Any) -> Path:
    folder: Path = tiny_checkpoint("llama")
    return folder


@pytest.fixture(scope="session")
def drafts(tiny_checkpoint: Any) -> dict[str, Path | str]:
    return {
        "near": tiny_checkpoint("llama", perturb=0.02),
        "far": tiny_checkpoint("llama", seed=5),
        "small": tiny_checkpoint("qwen3", seed=6, num_hidden_layers=1, head_dim=24),
        "ngram": "ngram",
    }


def alone(target: Path, **sampling: Any) -> list[list[Any]]:
    """Each request in an engine of its own, without drafts: what everything else must equal."""
    return [outputs(tiny_engine(spec(target, weights="int8")), asked([i], **sampling))[0] for i in range(8)]


@pytest.fixture
def expected(target: Path) -> list[list[Any]]:
    results = alone(target)
    assert len({tuple(token for token, _ in result) for result in results}) == 8
    assert sum(len({token for token, _ in result}) for result in results) > 80
    return results


@pytest.mark.parametrize("draft", ["near", "far", "small", "ngram"])
def test_no_draft_changes_a_bit(draft, target, drafts, expected):
    for length, budget in ((1, 2048), (4, 33), (8, 2048)):
        recorder = Recorder()
        engine = tiny_engine(
            spec(target, weights="int8", draft=drafts[draft], max_draft_tokens=length),
            observer=recorder,
            max_batch_tokens=budget,
        )
        assert outputs(engine, asked()) == expected
        blocks = [n for s in recorder.steps for n in s.drafted_per_block]
        accepted = [n for s in recorder.steps for n in s.accepted_per_block]
        assert max(blocks) == length
        if draft == "near":
            assert sum(accepted) > 0.2 * sum(blocks)
            assert sum(accepted) < sum(blocks)


@pytest.mark.parametrize("isa", ISAS)
def test_the_crowd_changes_nothing_on_any_instruction_set(isa, target, monkeypatch):
    require_native(isa)
    monkeypatch.setenv("PACELINE_ISA", isa)
    expected = alone(target)
    assert outputs(tiny_engine(spec(target, weights="int8")), asked()) == expected
    assert outputs(tiny_engine(spec(target, weights="int8"), threads=3), asked()[::-1]) == expected[::-1]


@pytest.mark.parametrize("budget", [17, 23, 64])
def test_chunks_of_prompts_and_a_warm_prefix_cache_change_nothing(budget, target, expected):
    recorder = Recorder()
    engine = tiny_engine(spec(target, weights="int8"), observer=recorder, max_batch_tokens=budget)
    assert outputs(engine, asked()) == expected
    cold = sum(s.prefix_hits for s in recorder.steps)
    assert outputs(engine, asked()) == expected
    assert sum(s.prefix_hits for s in recorder.steps) > cold + 100
    uncached = tiny_engine(spec(target, weights="int8"), max_batch_tokens=budget, prefix_caching=False)
    assert outputs(uncached, asked()) == expected


@pytest.mark.parametrize("draft", [None, "near"])
def test_preemption_changes_nothing(draft, target, drafts, expected):
    recorder = Recorder()
    block_bytes = 16 * 2 * 2 * 2 * 16 * 2  # tokens, layers, K and V, heads, head_dim, bf16
    tight = tiny_engine(
        spec(target, weights="int8", draft=drafts.get(draft or "")),
        observer=recorder,
        kv_cache_gib=24 * block_bytes / 2**30,
    )
    assert outputs(tight, asked()) == expected
    assert sum(s.preemptions for s in recorder.steps) > 0


def test_prompt_logprobs_do_not_depend_on_chunks(target):
    results = []
    for budget in (9, 2048):
        engine = tiny_engine(spec(target, weights="int8"), max_batch_tokens=budget, prefix_caching=False)
        events = [choices[0] for choices in run(engine, *asked(prompt_logprobs=2))]
        results.append([[e.prompt_logprobs for e in choice if e.prompt_logprobs] for choice in events])
    assert results[0] == results[1]
    assert all(len(entries[0]) == len(prompt) for entries, prompt in zip(results[0], prompts(), strict=True))
