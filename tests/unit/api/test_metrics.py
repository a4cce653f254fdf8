"""The metrics of the contract: names, labels, values, and gauges read at scrape time."""

import threading
from dataclasses import replace

import pytest
from asgi_client import AsgiClient
from fake_engine import FakeEngine, model_info
from prometheus_client.parser import text_string_to_metric_families

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.decoding.mixture import Pair
from paceline.server.engine.interface import (
    EngineState,
    PromptView,
    RequestStats,
    SteeringInfo,
    StepStats,
    WeightsInfo,
)
from paceline.server.engine.request import SpeculationStats
from paceline.server.metrics import Metrics

#: Sample name -> labels besides model_name, as the contract has them. Histograms by their base name.
CONTRACT = {
    "vllm:spec_decode_num_drafts_total": set(),
    "vllm:spec_decode_num_draft_tokens_total": set(),
    "vllm:spec_decode_num_accepted_tokens_total": set(),
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": {"position"},
    "vllm:num_requests_running": set(),
    "vllm:num_requests_waiting": set(),
    "vllm:kv_cache_usage_perc": set(),
    "vllm:prefix_cache_queries_total": set(),
    "vllm:prefix_cache_hits_total": set(),
    "vllm:num_preemptions_total": set(),
    "vllm:prompt_tokens_total": set(),
    "vllm:generation_tokens_total": set(),
    "vllm:request_success_total": {"finished_reason"},
    "vllm:time_to_first_token_seconds": set(),
    "vllm:inter_token_latency_seconds": set(),
    "vllm:e2e_request_latency_seconds": set(),
    "vllm:request_queue_time_seconds": set(),
    "paceline:step_seconds": {"phase"},
    "paceline:model_info": {"engine", "weights", "pattern", "draft"},
    "paceline:model_sparsity": set(),
}
#: Of the process, hence without ``model_name``.
CONTRACT_PROCESS = {
    "paceline:engine_state": {"state"},
    "paceline:http_responses_total": {"endpoint", "status"},
}
#: Series that exist only once something has happened.
CONTRACT_LATER = {
    "paceline:draft_info",
    "paceline:draft_swaps_total",
    "paceline:spec_disabled_total",
    "paceline:steering_requests_total",
}
STEP = StepStats(
    model="fake",
    phase_seconds={"schedule": 0.001, "draft": 0.01, "forward": 0.1, "sample": 0.002, "commit": 0.003},
    prompt_tokens=7,
    generated_tokens=5,
    drafted_per_block=[4, 4, 2],
    accepted_per_block=[2, 0, 2],
    prefix_queries=9,
    prefix_hits=3,
    preemptions=1,
    disabled=["no_room", "no_room"],
)
REQUEST = RequestStats(
    model="fake",
    finished_reason="stop",
    queue_seconds=0.2,
    first_token_seconds=0.5,
    inter_token_seconds=[0.01, 0.02],
    total_seconds=1.0,
    speculation=SpeculationStats(),
)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.attach(FakeEngine())
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """``name{label="value",...}`` without model_name -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            inside = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            found[f"{sample.name}{{{inside}}}" if inside else sample.name] = sample.value
    return found


def test_every_name_of_the_contract_is_there_before_anything_happened(metrics: Metrics) -> None:
    text = metrics.render().decode()
    families = list(text_string_to_metric_families(text))
    for name, labels in CONTRACT.items():
        base = name.removesuffix("_total")
        family = [one for one in families if one.name == base]
        assert len(family) == 1, name
        own = [s for s in family[0].samples if s.name in (name, f"{name}_count")]
        assert own, name
        for sample in own:
            assert set(sample.labels) == {"model_name", *labels}
            assert sample.labels["model_name"] == "fake"
    for name in CONTRACT_LATER:
        assert f"# HELP {name}" in text, name
    assert text.count("# HELP vllm:prompt_tokens_total") == 1


def test_what_is_of_the_process_names_no_model(client: AsgiClient) -> None:
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    for name, labels in CONTRACT_PROCESS.items():
        own = [s for family in families for s in family.samples if s.name == name]
        assert own, name
        assert {frozenset(sample.labels) for sample in own} == {frozenset(labels)}


def test_steps_are_counted(metrics: Metrics) -> None:
    metrics.on_step(STEP)
    metrics.on_step(STEP)
    found = samples(metrics)
    expected = {
        "vllm:prompt_tokens_total": 14,
        "vllm:generation_tokens_total": 10,
        "vllm:prefix_cache_queries_total": 18,
        "vllm:prefix_cache_hits_total": 6,
        "vllm:num_preemptions_total": 2,
        "vllm:spec_decode_num_drafts_total": 6,
        "vllm:spec_decode_num_draft_tokens_total": 20,
        "vllm:spec_decode_num_accepted_tokens_total": 8,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=0}": 4,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=1}": 4,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=2}": 0,
        "paceline:spec_disabled_total{reason=no_room}": 4,
        "paceline:step_seconds_count{phase=forward}": 2,
        "paceline:step_seconds_sum{phase=forward}": pytest.approx(0.2),
    }
    assert {key: found[key] for key in expected} == expected


def test_requests_are_counted(metrics: Metrics) -> None:
    metrics.on_request(REQUEST)
    metrics.on_request(
        RequestStats("fake", "abort", 0.1, None, (), 0.3, SpeculationStats())  # Left before its first token.
    )
    found = samples(metrics)
    expected = {
        "vllm:request_success_total{finished_reason=stop}": 1,
        "vllm:request_success_total{finished_reason=abort}": 1,
        "vllm:request_success_total{finished_reason=length}": 0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:time_to_first_token_seconds_sum": 0.5,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_sum": 1.3,
        "vllm:request_queue_time_seconds_count": 2,
    }
    assert {key: found[key] for key in expected} == expected


def test_gauges_are_read_when_scraped() -> None:
    engine = FakeEngine(state="loading")
    loaded, engine.models = engine.models, {}
    metrics = Metrics()
    metrics.attach(engine)
    metrics.attach(engine)
    assert "vllm:num_requests_running" not in samples(metrics)
    engine.models = loaded
    found = samples(metrics)
    assert found["vllm:num_requests_running"] == 0
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25


@pytest.mark.parametrize("state", ["loading", "ready", "draining", "stopped", "failed"])
def test_the_engines_state_is_the_one_that_is_1(state: EngineState) -> None:
    metrics = Metrics()
    metrics.attach(FakeEngine(state=state))
    states = {key: value for key, value in samples(metrics).items() if "engine_state" in key}
    assert len(states) == 5
    assert {key for key, value in states.items() if value == 1} == {f"paceline:engine_state{{state={state}}}"}
    assert sum(states.values()) == 1


def test_a_model_says_what_it_is() -> None:
    metrics = Metrics()
    sparse = model_info("half", weights=WeightsInfo("int8", "2:4", 0.5), default_draft=None)
    metrics.attach(FakeEngine(model_info(engine="vllm", weights=WeightsInfo("fp8")), sparse))
    page = metrics.render().decode()
    found = samples(metrics)
    assert found["paceline:model_info{draft=none,engine=native,pattern=2:4,weights=int8}"] == 1
    assert found["paceline:model_info{draft=tiny-draft,engine=vllm,pattern=dense,weights=fp8}"] == 1
    assert 'paceline:model_sparsity{model_name="half"} 0.5' in page
    assert 'paceline:model_sparsity{model_name="fake"} 0.0' in page


def test_responses_are_counted_by_endpoint_and_status(client: AsgiClient, engine: FakeEngine) -> None:
    def counts() -> dict[str, float]:
        page = client.get("/metrics").text
        families = text_string_to_metric_families(page)
        return {
            f"{s.labels['endpoint']} {s.labels['status']}": s.value
            for family in families
            for s in family.samples
            if s.name == "paceline:http_responses_total"
        }

    before = counts()
    assert before["/v1/completions 200"] == before["/v1/chat/completions 500"] == 0
    body = {"model": "fake", "prompt": "hi"}
    client.post("/v1/completions", body)
    client.post("/v1/completions", body | {"stream": True})
    client.post("/v1/completions", body | {"temperature": -1})
    client.post("/v1/completions", body | {"model": "another"})
    engine.refuse = RuntimeError("broken")
    client.post("/v1/completions", body)
    client.get("/v1/nothing/of-the-kind")
    client.get("/v1/models/fake")
    after = counts()
    assert after["/v1/completions 200"] == 2
    assert after["/v1/completions 400"] == after["/v1/completions 404"] == after["/v1/completions 500"] == 1
    assert after["other 404"] == after["other 200"] == 1
    assert after["/metrics 200"] == 1
    assert {key.partition(" ")[0] for key in after} <= {
        "other",
        "/metrics",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
    }


def test_refused_keys_are_counted(engine: FakeEngine) -> None:
    client = AsgiClient(create_app(engine, ApiSettings(api_keys=("k",)), Metrics()))
    assert client.post("/v1/completions", {"model": "fake", "prompt": "hi"}).status_code == 401
    page = client.get("/metrics").text
    assert 'paceline:http_responses_total{endpoint="/v1/completions",status="401"} 1.0' in page


def test_two_servers_in_one_process_do_not_mix() -> None:
    first, second = Metrics(), Metrics()
    first.on_step(STEP)
    assert "vllm:prompt_tokens_total" not in samples(second)


def test_counting_and_rendering_from_several_threads(metrics: Metrics) -> None:
    def count() -> None:
        for _ in range(200):
            metrics.on_step(STEP)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.render()
    assert samples(metrics)["vllm:prompt_tokens_total"] == 7 * 800


def test_served_over_http(client: AsgiClient) -> None:
    client.post("/v1/completions", {"model": "fake", "prompt": "hi"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert "vllm:kv_cache_usage_perc" in names


def test_steered_choices_are_counted_and_start_at_zero() -> None:
    pair = Pair("p", "cfg", None, 1, 1.0, (0.0, 4.0))
    metrics = Metrics()
    metrics.attach(FakeEngine(model_info(steering=SteeringInfo((pair,), (PromptView(),)))))
    assert samples(metrics)["paceline:steering_requests_total"] == 0
    metrics.on_request(REQUEST)
    metrics.on_request(replace(REQUEST, steered=True))
    assert samples(metrics)["paceline:steering_requests_total"] == 1
