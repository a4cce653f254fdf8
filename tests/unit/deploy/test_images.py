"""The Dockerfiles: users, bases, sources, and the health check, which runs against a live server."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from deploy_files import DEPLOY, load_yaml
from fake_engine import FakeEngine
from live_server import serve_in_thread

from paceline.server import serving
from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import ServerConfig
from paceline.server.engine.interface import EngineState
from paceline.server.metrics import Metrics

ROOT = DEPLOY.parent
FILES = ("Dockerfile.cpu", "Dockerfile.cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(name: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continued lines joined, comments left out."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line]


def last(name: str, word: str) -> str:
    return [rest for found, rest in instructions(name) if found == word][-1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("state", "alive"), [("loading", True), ("ready", True), ("draining", True), ("failed", False)]
)
def test_the_health_check_says_what_the_server_says(name: str, state: EngineState, alive: bool) -> None:
    """Its very command, but for the Python that runs it."""
    command = json.loads(last(name, "HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    with serve_in_thread(create_app(FakeEngine(state=state), ApiSettings(api_keys=("k",)), Metrics())) as url:
        port = url.rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, *command[1:]],
            env={"PACELINE_SERVER_PORT": port},
            capture_output=True,
            check=False,
        )
    assert (done.returncode == 0) is alive, done.stderr.decode()


def test_without_the_variable_it_asks_the_default_port() -> None:
    for name in FILES:
        assert f"'{ServerConfig().port}'" in last(name, "HEALTHCHECK")
        assert last(name, "EXPOSE") == str(ServerConfig().port)


@pytest.mark.parametrize("name", FILES)
def test_images_are_pinned_small_and_without_root(name: str) -> None:
    stages = [rest for word, rest in instructions(name) if word == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    (base,) = [rest for word, rest in instructions(name) if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=[a-z/]+:\d+\.\d+-[a-z-]+", base)
    assert last(name, "USER") == "10001:10001"
    after = [word for word, _ in instructions(name)]
    assert "RUN" not in after[len(after) - after[::-1].index("USER") :]
    (install,) = [rest for word, rest in instructions(name) if word == "RUN" and "/bin/pip install" in rest]
    assert "-c constraints.txt" in install
    extras = re.findall(r"\[([a-z,]+)\]", install)[0].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert ("vllm" in extras) is (name == "Dockerfile.cuda")
    assert PROJECT["project"]["version"] in [
        rest.partition("=")[2] for word, rest in instructions(name) if word == "ARG"
    ]


def test_what_the_wheel_is_built_from_reaches_the_build() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line[:1] == "!"
    }
    project = PROJECT["project"]
    needed = {"pyproject.toml", "setup.py", "constraints.txt", project["readme"], *project["license-files"]}
    needed |= set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert kept == needed
    assert all((ROOT / name).exists() for name in kept)


def test_compose_stops_the_server_no_sooner_than_it_can_drain() -> None:
    server = load_yaml("compose.yaml")["services"]["server"]
    grace = float(server["stop_grace_period"].removesuffix("s"))
    drain = float(server["environment"]["PACELINE_SERVER_DRAIN_SECONDS"])
    assert grace > drain + serving.FLUSH_SECONDS + serving.STOP_SECONDS


def test_versions_of_image_chart_and_package_are_one() -> None:
    version = PROJECT["project"]["version"]
    chart = load_yaml("helm/paceline/Chart.yaml")
    assert chart["version"] == chart["appVersion"] == version
    services = load_yaml("compose.yaml")["services"]
    assert {services[name]["image"] for name in ("server", "train")} == {f"paceline:{version}-cpu"}
    assert load_yaml("helm/values-vllm.yaml")["image"]["tag"] == f"{version}-cuda"
    multinode = Path(DEPLOY / "multinode" / "leaderworkerset.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"image: (.+)", multinode)) == {f"paceline:{version}-cuda"}
