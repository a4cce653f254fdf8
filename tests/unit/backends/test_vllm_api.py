"""The HTTP API over the vLLM adapter: same shapes, refusals that name the native engine, metrics merged."""

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from fake_llm import FakeLlm, ready_engine
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.parser import text_string_to_metric_families

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.metrics import Metrics

HELLO = [list(b"Hello"), list(b" you")]
DRAFT: dict[str, Any] = {"drafts": ("d",), "default_draft": "d", "max_draft_tokens": 3}


def ask(
    path: str, body: dict[str, Any] | None, metrics: Metrics | None = None, **about: Any
) -> httpx.Response:
    """One answer of the app over a scripted vLLM."""

    async def run() -> httpx.Response:
        observer = metrics or Metrics()
        engine = await ready_engine(FakeLlm(HELLO), observer, **about)
        transport = httpx.ASGITransport(app=create_app(engine, ApiSettings(), observer))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await (
                client.get(path) if body is None else client.post(path, json={"model": "fake", **body})
            )
        await engine.stop()
        return answer

    return asyncio.run(run())


def test_chat_is_answered() -> None:
    answer = ask(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    ).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello you"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("speculation", {"lenience": 0.5}, "speculation.lenience"),
        ("speculation", {"draft": "ngram"}, "speculation.draft"),
        ("speculation", {"enabled": False}, "speculation.enabled"),
        ("speculation", {"max_draft_tokens": 2}, "speculation.max_draft_tokens"),
        ("steering", {"alpha": 1.0}, "steering"),
        ("min_p", 0.1, "min_p"),
        ("logit_bias", {"5": 1.0}, "logit_bias"),
    ],
)
def test_what_only_the_native_engine_does_is_refused_by_name(field: str, value: Any, param: str) -> None:
    answer = ask("/v1/completions", {"prompt": "a", field: value}, **DRAFT)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "native_engine_only")
    assert "vLLM" in error["message"]
    assert "native engine" in error["message"]


def test_what_the_draft_rules_out_is_served_without_one() -> None:
    for field, value in (("min_p", 0.1), ("logit_bias", {"5": 1.0}), ("speculation", {"enabled": False})):
        assert ask("/v1/completions", {"prompt": "a", field: value}).status_code == 200


def test_sampling_is_refused_where_vllm_would_sample_wrongly() -> None:
    refused = ask("/v1/completions", {"prompt": "a", "temperature": 0.5}, greedy_only=True, **DRAFT)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"
    assert (
        ask("/v1/completions", {"prompt": "a", "temperature": 0}, greedy_only=True, **DRAFT).status_code
        == 200
    )


def test_a_seed_is_refused_where_the_draft_draws_without_it() -> None:
    seeded = {"prompt": "a", "temperature": 0.5, "seed": 3}
    refused = ask("/v1/completions", seeded, unseeded=True, **DRAFT)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "seed"
    assert ask("/v1/completions", seeded | {"temperature": 0}, unseeded=True, **DRAFT).status_code == 200
    assert ask("/v1/completions", seeded, **DRAFT).status_code == 200  # n-grams


def test_metrics_are_merged_and_carry_each_name_once() -> None:
    theirs = CollectorRegistry()
    Counter("vllm:prompt_tokens", "Also ours.", ["engine"], registry=theirs).labels("0").inc(99)
    Counter("vllm:only_theirs", "Not ours.", registry=theirs).inc(3)

    def others() -> Iterable[Metric]:
        return theirs.collect()

    metrics = Metrics()
    metrics.include(others)
    ask("/v1/completions", {"prompt": "a"}, metrics)
    text = ask_again(metrics)
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(typed) == len(set(typed))
    samples = {s.name: s.value for family in families for s in family.samples}
    assert samples["vllm:only_theirs_total"] == 3
    assert samples["vllm:prompt_tokens_total"] != 99
    assert samples["vllm:request_success_total"] is not None


def ask_again(metrics: Metrics) -> str:
    """The exposition; its engine is the one that it is attached to."""
    return metrics.render().decode()
