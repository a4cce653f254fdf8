"""What ``deploy/`` holds, as tests want it: queries of the dashboard and of the alerts, YAML documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


def load_yaml(path: str) -> Any:
    """The one document of a file of ``deploy/``."""
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    return made


def panels() -> Iterator[dict[str, Any]]:
    """Those that are no rows."""
    yield from (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def dashboard_queries() -> list[tuple[str, str]]:
    """(panel and letter, query as it stands there)."""
    return [
        (f"{panel['title']}/{target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def for_all(query: str) -> str:
    """A dashboard's query as Grafana sends it with all models and servers chosen."""
    chosen = query.replace("$model", ".*").replace("$instance", ".*").replace("$__rate_interval", "5m")
    assert "$" not in chosen, chosen
    return chosen


def alerts() -> dict[str, dict[str, Any]]:
    """Rules by name."""
    groups = load_yaml("alerts.yml")["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}
