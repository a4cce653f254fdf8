"""A real Prometheus scrapes a live server, by the configuration that we ship: every query of the dashboard gives
figures, every rule evaluates, and whatever they name is exported."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import prometheus_process
import pytest
from deploy_files import DEPLOY, alerts, dashboard_queries, for_all, load_yaml, panels
from engines import spec
from live_server import serve_in_thread
from prometheus_process import Prometheus, prometheus
from promql import grouping_labels, selectors
from sparse_students import write_tiny_student
from steered import pair, steered_spec

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig
from paceline.server.engine.build import build_engine
from paceline.server.metrics import Metrics

pytestmark = pytest.mark.skipif(
    prometheus_process.PROGRAM is None, reason="there is no prometheus on PATH (Debian's package has it)"
)
#: Labels that come from the target, as Kubernetes would set them.
TARGET_LABELS = {"namespace": "there", "pod": "paceline-0"}
ROUNDS = 3


@dataclass(frozen=True)
class Watched:
    prometheus: Prometheus
    page: str


@pytest.fixture(scope="module")
def watched(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """Scraped before and after some traffic, so that rates are known."""
    folder = tmp_path_factory.mktemp("watched")
    with (
        pytest.MonkeyPatch.context() as patch,
        serve_three(tiny_checkpoint, folder, patch) as url,
        prometheus(folder, scraping(url)) as server,
    ):
        server.until(lambda: counted(server) == 0)
        ask(url)
        finished = sum(
            float(line.split()[-1])
            for line in httpx.get(f"{url}/metrics").text.splitlines()
            if line.startswith("vllm:request_success_total")
        )
        assert finished == 3 * ROUNDS
        server.until(lambda: counted(server) == finished)
        yield Watched(server, httpx.get(f"{url}/metrics").text)


def serve_three(tiny_checkpoint: Callable[..., Path], folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """A model with a draft, a sparse one and a steered one."""
    patch.setenv("PACELINE_CACHE", str(folder / "cache"))
    target = tiny_checkpoint("llama")
    student = write_tiny_student(folder / "half", target, pattern="2:4")
    expert, anti = (tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, perturb=p) for p in (0.0, 0.4))
    config = PacelineConfig(
        engine=EngineConfig(device="cpu", threads=1, kv_cache_gib=4 / 1024, block_size=16),
        models=(
            spec(target, "drafted", draft=tiny_checkpoint("llama", perturb=0.02)),
            spec(student, "half", draft="ngram"),
            steered_spec(target, pair("p", anti, expert), name="steered", draft="expert"),
        ),
    )
    metrics = Metrics()
    engine = build_engine(config, metrics)
    app = create_app(engine, ApiSettings(), metrics)
    return serve_in_thread(app, startup=engine.start, shutdown=engine.stop)


def scraping(url: str) -> dict[str, Any]:
    """The shipped configuration, for this server and faster."""
    config: dict[str, Any] = load_yaml("prometheus.yml")
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [url.removeprefix("http://")], "labels": TARGET_LABELS}]
    return config


def counted(server: Prometheus) -> float:
    """Finished answers that Prometheus knows of; -1 before it has scraped."""
    found = server.query("sum(vllm:request_success_total)")
    return found[0][1] if found else -1


def ask(url: str) -> None:
    """Answers of all three models; the prompt is long enough for the prefix cache."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
        for _ in range(ROUNDS):
            for model in ("drafted", "half", "steered"):
                client.completions.create(
                    model=model,
                    prompt="the sea and the stone and the ship " * 4,
                    max_tokens=24,
                    temperature=0,
                )


def queries() -> list[tuple[str, str]]:
    """(where, query) of the dashboard and of the rules, as Prometheus gets them."""
    rules = [(name, rule["expr"]) for name, rule in alerts().items()]
    return [*((where, for_all(query)) for where, query in dashboard_queries()), *rules]


TARGETS = [(panel["title"], target) for panel in panels() for target in panel["targets"]]


@pytest.mark.parametrize(
    ("title", "target"), TARGETS, ids=[f"{title}/{target['refId']}" for title, target in TARGETS]
)
def test_every_panel_shows_figures(watched: Watched, title: str, target: dict[str, Any]) -> None:
    result = watched.prometheus.query(for_all(target["expr"]))
    assert any(math.isfinite(value) for _, value in result), (title, result)
    legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert all(legend <= set(labels) for labels, _ in result), title


def test_the_figures_are_those_of_the_traffic(watched: Watched) -> None:
    def by_model(panel: str) -> dict[str, float]:
        query = for_all(dict(dashboard_queries())[panel])
        return {labels["model_name"]: value for labels, value in watched.prometheus.query(query)}

    assert by_model("Weights left out/A") == pytest.approx({"drafted": 0, "half": 0.5, "steered": 0})
    assert by_model("Share of answers that are steered/A") == pytest.approx({"steered": 1})
    accepted = by_model("Draft acceptance rate/A")
    assert 0.3 < accepted["drafted"] <= 1
    served = watched.prometheus.query(for_all(dict(dashboard_queries())["Models served/A"]))
    said = {labels["model_name"]: (labels["pattern"], labels["draft"]) for labels, _ in served}
    assert said["half"] == ("2:4", "ngram")
    assert said["steered"] == ("dense", "expert")


@pytest.mark.parametrize(("where", "query"), queries(), ids=[where for where, _ in queries()])
def test_what_queries_name_is_exported(watched: Watched, where: str, query: str) -> None:
    """Each selector alone, matchers and all, finds series; each label that is grouped by is one of theirs."""
    found = {selector: watched.prometheus.query(selector) for selector in selectors(query)}
    assert found, where
    assert [selector for selector, series in found.items() if not series] == [], where
    known = {label for series in found.values() for labels, _ in series for label in labels}
    assert grouping_labels(query) <= known, where


def test_metrics_of_queries_stand_on_the_page(watched: Watched) -> None:
    """Not only in Prometheus, which adds series of its own such as ``up``."""
    names = {selector.partition("{")[0] for _, query in queries() for selector in selectors(query)}
    assert names - {"up"}
    for name in names - {"up"}:
        assert f"\n{name}{{" in watched.page, name


def test_every_rule_evaluates_and_none_fires(watched: Watched) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    watched.prometheus.until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert {rule["name"] for rule in rules()} == set(alerts())
    assert [rule["lastError"] for rule in rules() if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []


def test_the_autoscalers_metrics_are_found_per_pod(watched: Watched) -> None:
    """The adapter's rules, filled in as the adapter does it for one pod."""
    rules = load_yaml("helm/prometheus-adapter.yaml")["rules"]["custom"]
    assert len(rules) == 2
    for rule in rules:
        assert watched.prometheus.query(rule["seriesQuery"]), rule
        series = rule["seriesQuery"].partition("{")[0]
        matchers = ",".join(f'{label}="{value}"' for label, value in TARGET_LABELS.items())
        query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.LabelMatchers>>", matchers)
        ((labels, value),) = watched.prometheus.query(query.replace("<<.GroupBy>>", "pod"))
        assert labels == {"pod": TARGET_LABELS["pod"]}
        assert value == 0  # idle
        assert set(rule["resources"]["overrides"]) == set(TARGET_LABELS)
