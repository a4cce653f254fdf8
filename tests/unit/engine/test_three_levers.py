"""A sparse int8 target, steered by a pair of which one member is sparse too, with a draft: like any other model.

Greedy text is its own without speculation, and sampled text has the joint distribution that its logits say.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import size
from engines import Recorder, ids, request, run, submit, tiny_engine, tokens
from native_kernels import counted_calls, require_native
from sparse_students import write_tiny_student
from statistics_helpers import Floats, joint_chi_square, joint_counts
from steered import pair, runners, steered_spec, watch

from paceline.server.engine.engine import Engine
from paceline.server.engine.request import SpeculationParams

DEPTH, TOP_K, TEMPERATURE = 3, 3, 1.3
SAMPLES = size(40_000)
PASSES = 1e-4
PROMPT = [40, 41, 42, 43, 44, 45, 60, 7]
NO_DRAFT = SpeculationParams(enabled=False)


@pytest.fixture(scope="module")
def model(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """``model(draft=...)``: the configuration of the module's docstring."""
    folder = tmp_path_factory.mktemp("levers")
    parent = tiny_checkpoint("llama")
    base = write_tiny_student(folder / "base", parent, pattern="unstructured", dtype="int8")
    tuned = tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1)
    expert = write_tiny_student(folder / "expert", tuned, pattern="16:32", dtype="int8")
    anti = tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, perturb=0.4)
    sources = {"draft": parent, "expert": "expert"}

    def made(draft: str = "draft") -> Any:
        own = pair("p", anti, expert, alpha=1.2)
        return steered_spec(base, own, weights="int8", draft=sources[draft], max_draft_tokens=3)

    return made


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_KERNELS", "native")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "packed-cache"))


@pytest.mark.parametrize("draft", ["draft", "expert"])
def test_greedy_and_seeded_text_is_its_own_without_speculation(draft: str, model: Callable[..., Any]) -> None:
    recorder = Recorder()
    engine = tiny_engine(model(draft), observer=recorder)
    samplings: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 3}, {"frequency_penalty": 0.8}]
    for sampling in samplings:
        plain = tokens(engine, request(PROMPT, speculation=NO_DRAFT, max_tokens=40, **sampling))
        assert tokens(engine, request(PROMPT, max_tokens=40, **sampling)) == plain
    assert sum(n for step in recorder.steps for n in step.accepted_per_block) > 0


@pytest.mark.parametrize("draft", ["draft", "expert"])
def test_sampled_text_has_the_joint_distribution_of_the_combination(
    draft: str, model: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    engine = tiny_engine(model(draft), kv_cache_gib=64 / 1024)
    places, joint = exact_joint(engine)
    sampling: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "ignore_eos": True,
        "max_tokens": DEPTH + 4,
    }
    asked = [request(PROMPT, n=100, **sampling) for _ in range(-(-SAMPLES // 100))]
    drawn = [ids(choice) for choices in run(engine, *asked) for choice in choices]
    ranks = np.array([ranked(output[:DEPTH], places) for output in drawn])
    p = joint_chi_square(joint_counts(ranks, TOP_K), joint)
    record_property("p", f"{p:.4f}")
    assert p > PASSES


def exact_joint(engine: Engine) -> tuple[dict[tuple[int, ...], list[int]], Floats]:
    """For every prefix the tokens that may follow, and the probabilities of their ranks, [TOP_K] * DEPTH.

    From the engine's own log-probabilities without speculation, which other tests compare with transformers.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    joint = np.zeros((TOP_K,) * DEPTH)

    def visit(prefix: tuple[int, ...], rank: tuple[int, ...], probability: float) -> None:
        if len(prefix) == DEPTH:
            joint[rank] = probability
            return
        asked = request([*PROMPT, *prefix], max_tokens=1, logprobs=TOP_K, speculation=NO_DRAFT)
        [[[event]]] = run(engine, asked)
        assert event.logprobs is not None
        best = event.logprobs[0].top[:TOP_K]
        places[prefix] = [token for token, _ in best]
        weights = np.exp(np.array([logprob for _, logprob in best]) / TEMPERATURE)
        for i, share in enumerate(weights / weights.sum()):
            visit((*prefix, places[prefix][i]), (*rank, i), probability * share)

    visit((), (), 1.0)
    return places, joint


def ranked(output: list[int], places: dict[tuple[int, ...], list[int]]) -> list[int]:
    return [places[tuple(output[:i])].index(token) for i, token in enumerate(output)]


def test_a_step_runs_every_member_once_for_all_sequences(model: Callable[..., Any]) -> None:
    recorder = Recorder()
    engine = tiny_engine(model(), observer=recorder)
    rows = [watch(runner) for runner in runners(engine)]
    submit(engine, *(request(PROMPT[: i + 2], max_tokens=8, speculation=NO_DRAFT) for i in range(6)))
    while engine.has_work:
        engine.step()
    assert [len(own) for own in rows] == [len(recorder.steps)] * 3


def test_members_of_one_shape_go_together(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert and anti-expert in one native call; the target, which is deeper, in its own."""
    recorder = Recorder()
    engine = tiny_engine(model(), observer=recorder)
    calls = counted_calls(monkeypatch)
    run(engine, *(request(PROMPT[: i + 2], max_tokens=8, speculation=NO_DRAFT) for i in range(3)))
    assert calls == [1, 2] * len(recorder.steps)
