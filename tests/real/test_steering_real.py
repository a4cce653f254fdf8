"""Real weights, fp32: steered greedy text is that of three models in transformers, whoever drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Recorder, ids, request, run
from real_models import SMOLLM2
from steered import FORMULAS, pair, steered_spec
from transformers import AutoModelForCausalLM

from paceline.draftmodels.cut import cut_draft
from paceline.server.config.schema import EngineConfig, PacelineConfig
from paceline.server.engine.build import build_native
from paceline.server.engine.request import SpeculationParams

pytestmark = pytest.mark.real

NEW_TOKENS = 64
#: Combined logits closer than this may swap places: fp32 sums in another order differ by about 1e-4 in each member.
NEAR_TIE = 2e-3
QUESTIONS = [
    "What is the capital of Portugal?",
    "Write two lines about the sea at night.",
    "Explain to a child how rain is made.",
    "Name five animals that can fly.",
    "Translate to Spanish: Where is the station?",
    "What is 12 times 12?",
    "Give me a title for a story about a lost dog.",
    "Why do leaves fall in autumn?",
    "Write a function that adds two numbers.",
    "List the days of the week.",
    "Who was Marie Curie?",
    "How do I boil an egg?",
    "Tell me a joke about computers.",
    "What does a carpenter do?",
    "Describe a rainbow in one sentence.",
    "What is the opposite of cold?",
    "Write a short thank-you note.",
    "How many legs does a spider have?",
    "What is a noun?",
    "Invent a name for a bakery.",
]
#: Mode, strength, and how many of the questions.
CASES = [("proxy", 0.8, 20), ("amplify", 1.2, 5), ("cfg", 0.6, 5)]


@pytest.fixture(scope="module")
def members(real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2, and two cuts of it in place of an expert and an anti-expert: untrained, but of its own making."""
    folder, base = tmp_path_factory.mktemp("members"), real_model(SMOLLM2)
    cut_draft(str(base), (0, 1, 2, 27, 28, 29), folder / "expert")
    cut_draft(str(base), (0, 1, 28, 29), folder / "anti")
    return {"base": base, "expert": folder / "expert", "anti": folder / "anti"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("mode", "strength", "count"), CASES)
def test_greedy_text_is_that_of_transformers(
    mode: str, strength: float, count: int, members: dict[str, Path]
) -> None:
    torch.set_num_threads(2)
    has_expert = mode != "cfg"
    key = {"beta" if mode == "amplify" else "alpha": strength}
    own = pair("p", members["anti"], members["expert"] if has_expert else None, mode=mode, **key)
    model = steered_spec(members["base"], own, draft="expert" if has_expert else None, max_draft_tokens=3)
    recorder = Recorder()
    settings = EngineConfig(device="cpu", threads=2, kv_cache_gib=0.5)
    built = build_native(PacelineConfig(engine=settings, models=(model,)), recorder)
    tokenizer = built.models["m"].tokenizer
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS[:count]]
    plain = SpeculationParams(enabled=False)
    alone = [
        ids(choices[0])
        for choices in run(
            built.engine, *(request(p, max_tokens=NEW_TOKENS, speculation=plain) for p in prompts)
        )
    ]
    if has_expert:
        asked = [request(p, max_tokens=NEW_TOKENS) for p in prompts]
        assert [ids(choices[0]) for choices in run(built.engine, *asked)] == alone
        assert sum(n for step in recorder.steps for n in step.accepted_per_block) > 0

    models = {name: _opened(path) for name, path in members.items()}
    for prompt, output in zip(prompts, alone, strict=True):
        text = torch.tensor([[*prompt, *output[:-1]]])
        with torch.inference_mode():
            said = [model(text).logits[0, len(prompt) - 1 :].double() for model in models.values()]
        combined = FORMULAS[mode](*said, strength)
        # Each token is the argmax given those before it, so that a plain loop over the models would write this text.
        gaps = combined.max(-1).values - combined[torch.arange(len(output)), torch.tensor(output)]
        assert float(gaps.max()) < NEAR_TIE, (prompt, int(gaps.argmax()))
        # The base alone would write something else.
        base = said[0].argmax(-1).tolist()
        assert base != output


def _opened(path: Path) -> Any:
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
