"""The chart: linted and rendered by Helm, valid Kubernetes objects, and in keeping with the server that it starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, alerts, dashboard
from helm_chart import (
    ALL,
    CHART,
    LEAST,
    MISSING,
    VALUES,
    VLLM,
    check_object,
    environment,
    lint,
    one,
    pod_specs,
    render,
)

from paceline.server import serving
from paceline.server.api.auth import OPEN_PATHS
from paceline.server.config import PacelineConfig, load_config

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make lint-deploy)"
)
#: Kinds that Kubernetes itself does not have.
CUSTOM = {"ServiceMonitor", "PrometheusRule"}


def server(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def loaded(
    objects: list[dict[str, Any]], tmp_path: Path, secrets: dict[str, str] | None = None
) -> PacelineConfig:
    """The configuration as the server in the pod reads it: the mounted file under the container's environment."""
    container = server(objects)
    file = tmp_path / "paceline.toml"
    file.write_text(one(objects, "ConfigMap", "paceline")["data"][file.name], encoding="utf-8")
    assert container["args"] == ["serve", "--config", f"/etc/paceline/{file.name}"]
    return load_config(file, environment(container, secrets or {}), {})


@pytest.mark.parametrize("name", VALUES)
def test_helm_finds_nothing_wrong(name: str) -> None:
    assert lint(VALUES[name]) == []


@pytest.mark.parametrize("name", VALUES)
def test_objects_are_valid(name: str) -> None:
    objects = render(VALUES[name])
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    for made in objects:
        if made["kind"] not in CUSTOM:
            check_object(made)
    deployment = one(objects, "Deployment")
    with pytest.raises(
        pytest.fail.Exception, match="'replica' was unexpected"
    ):  # the check sees misspelt fields
        check_object({**deployment, "spec": {**deployment["spec"], "replica": 1}})


def test_what_is_rendered_by_default_and_at_most() -> None:
    always = ["ConfigMap", "Deployment", "PodDisruptionBudget", "Service"]
    kinds = sorted(made["kind"] for made in render({}))
    assert kinds == sorted([*always, "NetworkPolicy", "PersistentVolumeClaim", "PersistentVolumeClaim"])
    assert {made["kind"] for made in render(ALL)} >= {
        *("HorizontalPodAutoscaler", "CronJob", "Secret", "ServiceMonitor", "PrometheusRule")
    }
    assert {made["kind"] for made in render(LEAST)} == {
        "ConfigMap",
        "Deployment",
        "PodDisruptionBudget",
        "Service",
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"image": {"digest": "sha256:12"}}, "digest"),
        ({"drainSeconds": "30s"}, "drainSeconds"),
        ({"apiKeys": {"keys": ["a,b"]}}, "keys"),
        ({"config": "[server]\nport = 9000\n"}, "leave out"),
        ({"config": "[server]\n  api_keys = ['a']\n"}, "leave out"),
        ({"apiKeys": {"keys": ["a"], "existingSecret": "mine"}}, "not both"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], words: str) -> None:
    from helm_python.errors import HelmError

    with pytest.raises(HelmError, match=words):
        render(values)


def test_the_configuration_is_one_that_the_server_reads(tmp_path: Path) -> None:
    config = loaded(render({}), tmp_path)
    assert [model.target for model in config.models] == ["smollm2-135m-instruct"]
    assert (config.server.host, config.server.port, config.server.log_format) == ("0.0.0.0", 8000, "json")
    assert config.server.api_keys == ()
    (port,) = server(render({}))["ports"]
    assert port["containerPort"] == config.server.port


def test_the_configuration_for_vllm_too(tmp_path: Path) -> None:
    objects = render(VLLM)
    config = loaded(objects, tmp_path)
    assert config.engine.kind == "vllm"
    assert server(objects)["image"].endswith("-cuda")
    assert server(objects)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (shm,) = [m for m in server(objects)["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    assert shm["name"] == "shm"


def test_keys_reach_the_server_through_a_secret(tmp_path: Path) -> None:
    objects = render(ALL)
    secret = one(objects, "Secret")
    values = {f"{secret['metadata']['name']}/{key}": text for key, text in secret["stringData"].items()}
    assert loaded(objects, tmp_path, values).server.api_keys == ("one", "two")
    assert loaded(render(LEAST), tmp_path, {"mine/api-keys": "three"}).server.api_keys == ("three",)


@pytest.mark.parametrize(("drain", "pre_stop"), [(30, 10), (120, 0), (0, 5)])
def test_a_pod_is_given_the_time_that_draining_takes(drain: int, pre_stop: int, tmp_path: Path) -> None:
    objects = render({"drainSeconds": drain, "preStopSeconds": pre_stop})
    assert loaded(objects, tmp_path).server.drain_seconds == drain
    assert server(objects)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(pre_stop)]
    grace = one(objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > pre_stop + drain + serving.FLUSH_SECONDS + serving.STOP_SECONDS


def test_probes_ask_what_is_open_and_meant_for_them() -> None:
    container = server(render({"startupSeconds": 600}))
    paths = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(paths.values()) <= OPEN_PATHS
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 600


def test_pods_may_do_little() -> None:
    specs = list(pod_specs(render(ALL)))
    assert len(specs) == 2
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {volume["name"] for volume in spec["volumes"]} == {
            m["name"] for m in container["volumeMounts"]
        }


def test_trainer_and_server_share_the_drafts() -> None:
    objects = render(ALL)
    places = []
    for spec in pod_specs(objects):
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in spec["volumes"]
            if "persistentVolumeClaim" in v
        }
        (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "drafts"]
        places.append((claims["drafts"], mount["mountPath"], mount.get("readOnly", False)))
    assert sorted(places) == [("paceline-drafts", "/drafts", False), ("paceline-drafts", "/drafts", True)]
    one(objects, "PersistentVolumeClaim", "paceline-drafts")
    script = one(objects, "ConfigMap", "-train-draft")["data"]["train-draft.sh"]
    assert script == (DEPLOY / "train-draft.sh").read_text(encoding="utf-8")


def test_the_autoscaler_asks_for_what_the_adapter_makes() -> None:
    wanted = [
        metric["pods"]["metric"]["name"]
        for metric in one(render(ALL), "HorizontalPodAutoscaler")["spec"]["metrics"]
    ]
    rules = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"][
        "custom"
    ]
    assert sorted(wanted) == sorted(rule["name"]["as"] for rule in rules)
    assert "replicas" not in one(render(ALL), "Deployment")["spec"]
    assert one(render({"replicas": 3}), "Deployment")["spec"]["replicas"] == 3


def test_only_clients_and_scrapers_get_in() -> None:
    values = {
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"a": "b"}}}], "downloads": False}
    }
    policy = one(render(values), "NetworkPolicy")["spec"]
    (way,) = policy["ingress"]
    assert [port["port"] for port in way["ports"]] == ["http"]
    assert way["from"] == [
        {"podSelector": {"matchLabels": {"a": "b"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    assert [port["port"] for out in policy["egress"] for port in out["ports"]] == [53, 53]
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_selectors_find_the_servers_and_nothing_else() -> None:
    objects = render(ALL, name="mine")
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    trainer = one(objects, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        one(objects, "Service")["spec"]["selector"],
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "mine-paceline")["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= trainer.items()
    monitored = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= one(objects, "Service")["metadata"]["labels"].items()


def test_rules_and_dashboard_are_the_shipped_ones() -> None:
    objects = render(ALL)
    groups = one(objects, "PrometheusRule")["spec"]["groups"]
    assert {rule["alert"]: rule for group in groups for rule in group["rules"]} == alerts()
    shown = one(objects, "ConfigMap", "-dashboard")["data"]["paceline.json"]
    assert yaml.safe_load(shown) == dashboard()
    (endpoint,) = one(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert {"targetLabel": "job", "replacement": "paceline"} in endpoint["relabelings"]
    assert endpoint["port"] == one(objects, "Service")["spec"]["ports"][0]["name"]
