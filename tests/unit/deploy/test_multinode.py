"""The multi-node set-up: its configuration is one that we read, and leader, workers and nodes agree with each other."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from deploy_files import DEPLOY, load_yaml
from helm_chart import MISSING, check_object, environment

from paceline.server import serving
from paceline.server.config import PacelineConfig, load_config

TEMPLATES = ("leaderTemplate", "workerTemplate")


def group() -> dict[str, Any]:
    spec: dict[str, Any] = load_yaml("multinode/leaderworkerset.yaml")["spec"]["leaderWorkerTemplate"]
    return spec


def pod(template: str) -> dict[str, Any]:
    spec: dict[str, Any] = group()[template]["spec"]
    return spec


@pytest.fixture
def config() -> PacelineConfig:
    return load_config(
        DEPLOY / "multinode" / "paceline.toml", environment(pod("leaderTemplate")["containers"][0], {}), {}
    )


def worker_flags() -> Mapping[str, str | None]:
    """``--nnodes 2`` as nnodes: "2"; a switch has None, the model is called model."""
    (command,) = pod("workerTemplate")["containers"][0]["args"]
    words = shlex.split(command)
    assert words[:3] == ["exec", "vllm", "serve"]
    flags: dict[str, str | None] = {"model": words[3]}
    for word, following in zip(words[4:], [*words[5:], "--"], strict=True):
        if word.startswith("--"):
            flags[word[2:].replace("-", "_")] = None if following.startswith("--") else following
    return flags


def test_leader_and_workers_say_the_same(config: PacelineConfig) -> None:
    arguments = {name: str(value) for name, value in config.engine.vllm.items()}
    flags = dict(worker_flags())
    assert flags.pop("headless", "missing") is None
    assert flags.pop("model") == config.models[0].target
    assert (arguments.pop("node_rank"), flags.pop("node_rank")) == ("0", "$LWS_WORKER_INDEX")
    assert (arguments.pop("master_addr"), flags.pop("master_addr")) == ("LEADER", "$LWS_LEADER_ADDRESS")
    assert flags == arguments
    assert config.models[0].speculation.draft is None


def test_the_leaders_address_is_put_where_the_configuration_wants_it(
    config: PacelineConfig, tmp_path: Path
) -> None:
    (script,) = pod("leaderTemplate")["containers"][0]["args"]
    (pattern,) = re.findall(r"s/(\w+)/\$LWS_LEADER_ADDRESS/", script)
    text = (DEPLOY / "multinode" / "paceline.toml").read_text(encoding="utf-8")
    assert text.count(pattern) == 1
    file = tmp_path / "paceline.toml"
    file.write_text(text.replace(pattern, "paceline-0.paceline.there"), encoding="utf-8")
    assert load_config(file, {}, {}).engine.vllm["master_addr"] == "paceline-0.paceline.there"
    assert "exec paceline serve --config /tmp/paceline.toml" in script


def test_there_are_as_many_gpus_as_the_model_is_split_over(config: PacelineConfig) -> None:
    asked = config.engine.vllm
    gpus = [
        int(pod(template)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for template in TEMPLATES
    ]
    assert gpus == [asked["tensor_parallel_size"]] * 2
    assert group()["size"] == asked["nnodes"] == asked["pipeline_parallel_size"]


def test_the_leader_drains(config: PacelineConfig) -> None:
    spec = pod("leaderTemplate")
    pre_stop = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = pre_stop + config.server.drain_seconds + serving.FLUSH_SECONDS + serving.STOP_SECONDS
    assert spec["terminationGracePeriodSeconds"] > needed


def test_the_service_finds_leaders_only() -> None:
    selector = load_yaml("multinode/service.yaml")["spec"]["selector"].items()
    found = {template: selector <= group()[template]["metadata"]["labels"].items() for template in TEMPLATES}
    assert found == {"leaderTemplate": True, "workerTemplate": False}


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make lint-deploy)")
@pytest.mark.parametrize("template", TEMPLATES)
def test_pods_are_valid(template: str) -> None:
    """A LeaderWorkerSet's schema is no part of Kubernetes; the pods in it are."""
    made = group()[template]
    check_object(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p", **made["metadata"]},
            "spec": made["spec"],
        }
    )
    check_object(load_yaml("multinode/service.yaml"))


def test_kustomize_reads_what_is_there() -> None:
    made = load_yaml("multinode/kustomization.yaml")
    (config_map,) = made["configMapGenerator"]
    files = [*made["resources"], *config_map["files"], "kustomization.yaml"]
    assert sorted(files) == sorted(path.name for path in (DEPLOY / "multinode").iterdir())
    (volume,) = [v for v in pod("leaderTemplate")["volumes"] if "configMap" in v]
    assert volume["configMap"]["name"] == config_map["name"]
