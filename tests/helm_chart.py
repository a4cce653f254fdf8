"""The chart, linted and rendered by Helm itself (the library in ``helm-python-sdk``), as Kubernetes objects."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY

CHART = DEPLOY / "helm" / "paceline"
#: Oldest and newest Kubernetes that the chart is checked against.
KUBERNETES = ("1.25", "1.37")
MISSING = [name for name in ("helm_python", "kubernetes_validate") if find_spec(name) is None]
#: Everything that can be switched on.
ALL: Mapping[str, Any] = {
    "apiKeys": {"keys": ["one", "two"]},
    "autoscaling": {"enabled": True},
    "trainDraft": {"enabled": True},
    "monitoring": {
        "serviceMonitor": True,
        "prometheusRule": True,
        "dashboard": True,
        "labels": {"release": "x"},
    },
    "sharedMemory": "8Gi",
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"kind": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "podAnnotations": {"a": "b"},
    "volumes": {"models": {"storageClass": "shared", "accessModes": ["ReadWriteOnce"]}},
}
#: Everything that can be left out.
LEAST: Mapping[str, Any] = {
    "networkPolicy": {"enabled": False},
    "apiKeys": {"existingSecret": "mine"},
    "volumes": {"models": {"existingClaim": "m"}, "drafts": {"existingClaim": "d"}},
    "image": {"digest": "sha256:" + "0" * 64},
}
VLLM: Mapping[str, Any] = yaml.safe_load((DEPLOY / "helm" / "values-vllm.yaml").read_text(encoding="utf-8"))
VALUES: Mapping[str, Mapping[str, Any]] = {"default": {}, "all": ALL, "least": LEAST, "vllm": VLLM}


def lint(values: Mapping[str, Any]) -> list[str]:
    """What ``helm lint --strict`` has to say, hints apart."""
    from helm_python import chart

    report = chart.lint(CHART, dict(values), strict=True)
    assert report["total_charts_linted"] == 1
    return [*report["errors"], *(m["error"] for m in report["messages"] if m["severity"] > 1)]


def render(values: Mapping[str, Any], name: str = "paceline") -> list[dict[str, Any]]:
    """The objects of a release."""
    from helm_python import chart

    with chart.Chart.load(CHART) as loaded:
        loaded.validate_schema(dict(values))
        files = loaded.render(dict(values), name=name, namespace="there")
    texts = (text for path, text in sorted(files.items()) if path.endswith(".yaml"))
    return [made for text in texts for made in yaml.safe_load_all(text) if made is not None]


def one(objects: list[dict[str, Any]], kind: str, suffix: str = "") -> dict[str, Any]:
    """The only object of a kind whose name ends so."""
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(suffix)]
    return found


def pod_specs(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the server and, if there is one, of the training job."""
    for made in objects:
        if made["kind"] == "Deployment":
            yield made["spec"]["template"]["spec"]
        elif made["kind"] == "CronJob":
            yield made["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def check_object(made: Mapping[str, Any]) -> None:
    """Against the OpenAPI schemas of Kubernetes, unknown fields being errors; fails with the schema's words."""
    import kubernetes_validate

    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(dict(made), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            pytest.fail(f"{made['kind']} on Kubernetes {version}: {place}: {error.message}", pytrace=False)


def environment(container: Mapping[str, Any], secrets: Mapping[str, str]) -> dict[str, str]:
    """A container's variables; those from secrets by ``NAME/KEY``."""

    def value(entry: Mapping[str, Any]) -> str:
        if "value" in entry:
            return str(entry["value"])
        place = entry["valueFrom"]["secretKeyRef"]
        return secrets[f"{place['name']}/{place['key']}"]

    return {entry["name"]: value(entry) for entry in container["env"]}
