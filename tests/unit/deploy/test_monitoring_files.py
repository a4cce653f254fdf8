"""Prometheus' and Grafana's files fit together: names, rows, and a test for every alert."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from deploy_files import DEPLOY, alerts, dashboard, dashboard_queries, load_yaml, panels


def test_every_alert_is_tested_to_fire_and_to_be_silent() -> None:
    """promtool runs the cases; that there are some for each alert shows here."""
    cases = [case for group in load_yaml("alerts_test.yml")["tests"] for case in group["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(alerts())
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(alerts())


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool on PATH (Debian: prometheus)"
)
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(check: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *check], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_say_what_to_do() -> None:
    for name, rule in alerts().items():
        assert set(rule["annotations"]) == {"summary", "description"}, name
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["for"], name


def test_the_dashboard_has_its_rows_and_no_panel_twice() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic and latency", "Speculation", "Sparsity", "Steering"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    spots = [where for where, _ in dashboard_queries()]
    assert len(spots) > 30
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in panels())


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_grafana_is_told_where_prometheus_and_the_dashboard_are() -> None:
    compose = load_yaml("compose.yaml")["services"]
    (source,) = load_yaml("grafana/provisioning/datasources/paceline.yaml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    (provider,) = load_yaml("grafana/provisioning/dashboards/paceline.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./grafana.json"].startswith(provider["options"]["path"] + "/")
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    for source_path in [path for path in mounts if path.startswith("./")]:
        assert (DEPLOY / source_path).exists()


def test_prometheus_scrapes_the_server_of_the_compose_file() -> None:
    (job,) = load_yaml("prometheus.yml")["scrape_configs"]
    assert job["job_name"] == "paceline"  # as the alerts have it
    assert all('job="paceline"' in rule["expr"] for rule in alerts().values() if "up{" in rule["expr"])
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    published = load_yaml("compose.yaml")["services"][host]["ports"]
    assert [entry.rpartition(":")[2] for entry in published] == [port]


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(DEPLOY))
)
def test_yaml_is_read(path: Path) -> None:
    if "templates" not in path.parts:  # those of the chart are templates
        assert list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
