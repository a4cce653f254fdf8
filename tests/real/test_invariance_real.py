"""Real weights in int8: ids and logprobs are bit for bit the same with any draft, alone and in a crowd."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import Recorder, request, run
from native_kernels import require_native
from real_models import SMOLLM2

from paceline.draftmodels.cut import cut_draft
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig
from paceline.server.engine.build import build_native
from paceline.server.engine.engine import Engine
from paceline.server.engine.interface import Tokenizer
from paceline.server.engine.request import Request, SpeculationParams, TokenEvent

pytestmark = pytest.mark.real

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about a railway station at night.",
    "Repeat three times: the cat sat on the mat, the cat sat on the mat, the cat sat on the mat.",
    "Explain to a child why the sky is blue.",
    "List three uses for an old newspaper.",
    "Once upon a time, in a village by the sea,",
]
CROWD = ["Name the planets.", "Why do cats purr? Answer in one paragraph."]
SAMPLING: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}]
NO_DRAFT = SpeculationParams(enabled=False)


def asked(tokenizer: Tokenizer, prompts: Sequence[str], speculation: SpeculationParams) -> list[Request]:
    """Greedy and seeded in turn."""
    return [
        request(
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}]),
            max_tokens=32,
            ignore_eos=True,
            logprobs=2,
            speculation=speculation,
            **SAMPLING[i % 2],
        )
        for i, prompt in enumerate(prompts)
    ]


def output(events: list[TokenEvent]) -> list[Any]:
    return [entry for event in events for entry in zip(event.token_ids, event.logprobs or (), strict=True)]


def together(engine: Engine, requests: list[Request]) -> list[list[Any]]:
    return [output(choices[0]) for choices in run(engine, *requests)]


def test_drafts_and_crowds_change_no_bit(
    real_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_KERNELS", "native")
    path = real_model(SMOLLM2)
    cut_draft(str(path), (0, 1, 28, 29), tmp_path / "cut")
    recorder = Recorder()
    speculation = SpeculationConfig(draft=str(tmp_path / "cut"), policy="fixed")
    model = ModelSpec("m", str(path), "int8", None, speculation)
    settings = EngineConfig(device="cpu", threads=2, kv_cache_gib=0.25, prefix_caching=False)
    built = build_native(PacelineConfig(engine=settings, models=(model,)), recorder)
    tokenizer = built.models["m"].tokenizer

    alone = [together(built.engine, [r])[0] for r in asked(tokenizer, PROMPTS, NO_DRAFT)]
    assert len({tuple(token for token, _ in result) for result in alone}) == len(PROMPTS)
    assert all(len(result) == 32 for result in alone)
    assert not any(s.drafted_per_block for s in recorder.steps)

    everyone = [*PROMPTS, *CROWD]
    assert together(built.engine, asked(tokenizer, everyone, NO_DRAFT))[: len(PROMPTS)] == alone
    for draft in ("cut", "ngram"):
        recorder.steps.clear()
        got = together(built.engine, asked(tokenizer, everyone, SpeculationParams(draft=draft)))
        assert got[: len(PROMPTS)] == alone, draft
        assert sum(n for s in recorder.steps for n in s.drafted_per_block) > 20
    assert built.engine.kv_usage() == 0
