"""Real weights, fp32: greedy text equals transformers, and speculation changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import Recorder, ids, request, run
from real_models import QWEN_CODER, SMOLLM2
from transformers import AutoModelForCausalLM

from paceline.draftmodels.cut import cut_draft
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig
from paceline.server.engine.build import build_native
from paceline.server.engine.native import BuiltEngine
from paceline.server.engine.request import Request, SpeculationParams

pytestmark = pytest.mark.real

NEW_TOKENS = 64
#: Logits closer than this may swap places: fp32 sums in another order differ by about 1e-4.
NEAR_TIE = 1e-3
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about a railway station at night.",
    "Explain to a child why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to German: The weather is nice today.",
    "List three uses for an old newspaper.",
    "What is 17 times 23? Show your steps.",
    "Summarise: A fox saw grapes, could not reach them, and said they were sour.",
    "SELECT name, COUNT(*) FROM",
    "Why do cats purr? Answer in one paragraph.",
    "Write a polite e-mail asking for a day off.",
    "Once upon a time, in a village by the sea,",
    "Name the planets of the solar system in order.",
    "Fix this Python code: for i in range(10) print(i)",
    "What are the pros and cons of electric cars?",
    "こんにちは、元気ですか？",
    "Give me a recipe for pancakes.",
    "Continue the list: red, orange, yellow,",
    "Who wrote Romeo and Juliet, and when?",
    '{"name": "Ada", "born": 1815, "known_for":',
]
#: The drafts that prompts are given in turn, run by run. The larger model takes minutes: one run of it has both kinds.
DRAFTS: dict[str, list[tuple[str, ...]]] = {SMOLLM2: [("cut",), ("ngram",)], QWEN_CODER: [("cut", "ngram")]}
NO_DRAFT = SpeculationParams(enabled=False)


def build(path: Path, name: str, draft: str | None = None) -> tuple[BuiltEngine, Recorder]:
    recorder = Recorder()
    model = ModelSpec(name, str(path), "fp32", None, SpeculationConfig(draft=draft, policy="fixed"))
    settings = EngineConfig(device="cpu", threads=2, kv_cache_gib=0.5)
    return build_native(PacelineConfig(engine=settings, models=(model,)), recorder), recorder


def asked(built: BuiltEngine, name: str, *speculations: SpeculationParams) -> list[Request]:
    """All prompts, which take turns with what is given."""
    tokenizer = built.models[name].tokenizer
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": p}]) for p in PROMPTS]
    return [
        request(p, model=name, max_tokens=NEW_TOKENS, speculation=speculations[i % len(speculations)])
        for i, p in enumerate(prompts)
    ]


def check_greedy(logits: torch.Tensor, output: list[int], label: str) -> int:
    """Every token is the argmax of its position, or as good as it; returns how often it was the latter."""
    gaps = logits.max(dim=-1).values - logits[torch.arange(len(output)), torch.tensor(output)]
    worst = float(gaps.max())
    assert worst < NEAR_TIE, f"{label}: token {int(gaps.argmax())} is {worst:.4f} below the best"
    return int((gaps > 0).sum())


@pytest.mark.timeout(1800)  # minutes of fp32 on two idle cores, many more on busy ones
@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_equals_transformers_and_speculation_changes_nothing(
    name: str, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    path = real_model(name)
    layers = (0, 1, 22, 23) if "qwen" in name else (0, 1, 28, 29)
    cut_draft(str(path), layers, tmp_path / "cut")
    built, recorder = build(path, name, draft=str(tmp_path / "cut"))
    plain = asked(built, name, NO_DRAFT)
    outputs = [ids(choices[0]) for choices in run(built.engine, *plain)]

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ties, reference = 0, []
    with torch.inference_mode():
        for r, output in zip(plain, outputs, strict=True):
            tokens = torch.tensor([[*r.prompt_ids, *output[:-1]]])
            logits = model(tokens, logits_to_keep=len(output)).logits[0]
            reference.append(logits)
            ties += check_greedy(logits, output, "plain")
    assert len({tuple(output) for output in outputs}) == len(PROMPTS)

    for drafts in DRAFTS[name]:
        drafted = asked(built, name, *(SpeculationParams(draft=draft) for draft in drafts))
        for i, choices in enumerate(run(built.engine, *drafted)):
            got = ids(choices[0])
            same = next((k for k, (a, b) in enumerate(zip(got, outputs[i], strict=False)) if a != b), None)
            if same is None:
                assert len(got) == len(outputs[i])
            else:  # a near-tie went the other way: up to there equal, and there as good
                ties += check_greedy(reference[i][: same + 1], got[: same + 1], drafts[i % len(drafts)])
    assert sum(n for s in recorder.steps for n in s.drafted_per_block) > 1000
    assert built.engine.kv_usage() == 0
    total = (1 + len(DRAFTS[name])) * sum(map(len, outputs))
    print(f"{name}: {ties} near-ties in {total} tokens")  # noqa: T201
