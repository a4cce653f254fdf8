"""Presets, scenarios and prompts of the side-by-side bench."""

import pytest
from bench_stand_ins import bench_plan

from paceline.clients import bench_presets
from paceline.clients.bench_presets import PRESETS, find_preset
from paceline.clients.bench_scenarios import CODE_PROMPTS, LONG_PROMPT_WORDS, Scenario, long_text
from paceline.clients.traffic import ClosedLoop
from paceline.clients.workload import BUILT_IN, Prompt, UsageError


def texts(
    scenario: Scenario, source: tuple[Prompt, ...], round_number: int, level: int, count: int
) -> list[str]:
    made = scenario.prompts(source, round_number, ClosedLoop(level), count)
    return [prompt.body("chat")["messages"][0]["content"] for prompt in made]


@pytest.mark.parametrize("name", ["short", "long"])
def test_no_prompt_is_asked_twice_and_everyone_gets_the_same(name: str) -> None:
    scenario = Scenario(name, ())  # type: ignore[arg-type]
    asked = [t for r in (1, 2) for level in (1, 16) for t in texts(scenario, BUILT_IN, r, level, 40)]
    assert len(set(asked)) == len(asked) == 160
    # Not even the beginning is shared, so that no prefix cache helps.
    assert len({text[:10] for text in asked}) == 160
    assert texts(scenario, BUILT_IN, 2, 16, 40) == asked[-40:]


def test_rounds_go_through_the_source_in_turn() -> None:
    source = tuple(Prompt(text=f"question {i}") for i in range(5))
    scenario = Scenario("short", ())
    asked = [text.split(") ")[1] for r in (1, 2, 3) for text in texts(scenario, source, r, 1, 2)]
    assert asked == [f"question {i}" for i in (0, 1, 2, 3, 4, 0)]


def test_answers_are_equally_long_whatever_the_prompt_says() -> None:
    (made,) = Scenario("short", ()).prompts([Prompt(text="Hi", max_tokens=3)], 1, ClosedLoop(1), 1)
    assert made.max_tokens is None
    pictures = [Prompt(messages=[{"role": "user", "content": [{"type": "image_url"}]}])]
    with pytest.raises(UsageError, match="plain text"):
        Scenario("short", ()).prompts(pictures, 1, ClosedLoop(1), 1)


def test_long_prompts_are_long_and_differ() -> None:
    first, second = long_text("a"), long_text("b")
    for text in (first, second):
        assert LONG_PROMPT_WORDS < len(text.split()) < LONG_PROMPT_WORDS + 60
    shared = set(first.split(". ")) & set(second.split(". "))
    assert len(shared) < 8  # of about 55 sentences


def test_presets_hold_what_the_readme_says() -> None:
    smollm2, pair = find_preset("smollm2"), find_preset("qwen-pair")
    assert smollm2.streams == {"short": (1, 4, 16), "long": (1, 4, 16)}
    assert (smollm2.draft, smollm2.llamacpp_q8_0, smollm2.restart) == (None, True, False)
    assert (pair.model, pair.draft) == ("qwen2.5-coder-1.5b-instruct", "qwen2.5-coder-0.5b-instruct")
    assert (pair.llamacpp_q8_0, pair.restart, pair.prompts) == (False, True, CODE_PROMPTS)
    with pytest.raises(UsageError, match="smollm2, qwen-pair"):
        find_preset("smollm3")
    assert set(PRESETS) == {"smollm2", "qwen-pair"}


def test_scenarios_can_be_chosen_and_their_streams_replaced() -> None:
    pair = find_preset("qwen-pair")
    both = bench_presets.scenarios(pair, None, None)
    assert [(s.name, [level.concurrency for level in s.levels]) for s in both] == [
        ("short", [1, 4, 16]),
        ("long", [1]),
    ]
    (only,) = bench_presets.scenarios(pair, "long", [ClosedLoop(4)])
    assert (only.name, only.levels) == ("long", (ClosedLoop(4),))
    with pytest.raises(UsageError, match=r"'longer'.*short, long"):
        bench_presets.scenarios(pair, "longer", None)


def test_peers_can_be_chosen() -> None:
    assert bench_presets.peers(None) == ("llama.cpp", "vllm", "transformers")
    assert bench_presets.peers("transformers,llama.cpp") == ("llama.cpp", "transformers")
    assert bench_presets.peers("none") == ()
    with pytest.raises(UsageError, match="'sglang'"):
        bench_presets.peers("vllm,sglang")


def test_ours_run_plain_with_ngrams_and_with_the_draft() -> None:
    assert bench_presets.serve_options(None) == [
        ["--weights", "int8", "--draft", "none"],
        ["--weights", "int8", "--draft", "ngram"],
        ["--weights", "int8", "--draft", "auto"],
    ]
    assert bench_presets.serve_options("small")[2] == ["--weights", "int8", "--draft", "small"]


def test_requests_per_level() -> None:
    plan = bench_plan(requests=4, requests_per_stream=2)
    assert [plan.count(ClosedLoop(n)) for n in (1, 2, 16)] == [4, 4, 32]
    assert plan.slots == 2
