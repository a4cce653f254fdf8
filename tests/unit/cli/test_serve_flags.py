"""The server's commands: every configuration key is a flag of ``serve``; ``info``, ``models`` and ``pull`` tell."""

import inspect
import json
from pathlib import Path

import pytest

from paceline.clients import console
from paceline.server import cli, report
from paceline.server.config import Key, PacelineConfig, keys, load_config
from paceline.server.models import sources


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[PacelineConfig]:
    """What ``paceline serve`` would serve, instead of serving it."""
    configs: list[PacelineConfig] = []

    def serve(config: PacelineConfig) -> int:
        configs.append(config)
        return 7

    monkeypatch.setattr("paceline.server.serving.serve", serve)
    return configs


def _arguments(key: Key) -> list[str]:
    if key.kind == "bool":
        return [key.flag.replace("--", "--no-" if key.default else "--", 1)]
    word = "0.5" if key.high == 1 else "5" if "t" in key.kind else "6"
    word = key.choices[-1] if key.kind == "choice" else word
    return [key.flag, word] if key.flag.startswith("--") else [word]


def test_every_key_is_a_parameter_of_serve() -> None:
    parameters = inspect.signature(cli.serve).parameters
    assert {key.param for key in keys()} == parameters.keys() - {"config", "json"}


@pytest.mark.parametrize("key", keys(), ids=lambda key: f"{key.section}.{key.name}")
def test_every_flag_reaches_the_configuration(key: Key, served: list[PacelineConfig]) -> None:
    arguments = _arguments(key)
    assert console.main(["serve", *arguments]) == 7
    given = False if arguments[0].startswith("--no-") else True if key.kind == "bool" else arguments[-1]
    assert served == [load_config(None, {}, {key.param: [given] if key.kind == "texts" else given})]
    assert len(key.choices) == 1 or served != [load_config(None, {}, {})]


def test_help_shows_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in keys():
        assert key.flag in text
        assert key.help in text
    assert "[default: 8000]" in text
    assert "auto|fp32|bf16" in text
    assert "int4" not in text  # what this version refuses is not offered


def test_file_variables_and_flags_together(
    served: list[PacelineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "paceline.toml"
    path.write_text('[server]\nport = 1\nhost = "h1"\ndrain_seconds = 1\n')
    monkeypatch.setenv("PACELINE_SERVER_PORT", "2")
    monkeypatch.setenv("PACELINE_SERVER_HOST", "h2")
    arguments = [
        "m.gguf",
        "--config",
        str(path),
        "--port",
        "3",
        "--api-key",
        "a,b",
        "--api-key",
        "c",
        "--json",
    ]
    assert console.main(["serve", *arguments]) == 7
    server = served[0].server
    assert (server.port, server.host, server.drain_seconds, server.log_format) == (3, "h2", 1.0, "json")
    assert server.api_keys == ("a,b", "c")
    assert served[0].models[0].target == "m.gguf"


def test_info_says_the_same_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["paceline"]
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["devices"][0] == "cpu"
    assert facts["auto"].keys() == {"device", "threads", "weights"}
    assert facts["executor"] == "native CPU kernels" or facts["executor"].startswith("torch, ")
    assert "native library" in facts["kernels"]
    assert console.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"weights          {facts['auto']['weights']}" in text
    assert f"executor: {facts['executor']}" in text


def test_info_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    known = report._version
    monkeypatch.setattr(report, "_version", lambda name: None if name == "torch" else known(name))
    facts = report.report()
    assert (facts["versions"]["torch"], facts["executor"], facts["auto"]) == (None, None, None)
    assert "executor: not installed" in list(report.lines(facts))


def test_models_shows_what_is_fetched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.gguf"
    monkeypatch.setattr(sources, "cached", lambda name: path if name == "smollm2-135m-instruct" else None)
    assert console.main(["models", "--json"]) == 0
    paths = {entry["name"]: entry["path"] for entry in json.loads(capsys.readouterr().out)}
    assert paths.pop("smollm2-135m-instruct") == str(path)
    assert set(paths.values()) == {None}
    assert console.main(["models"]) == 0
    text = capsys.readouterr().out
    assert str(path) in text
    assert text.count("not fetched") == len(paths)


@pytest.mark.parametrize("as_json", [False, True])
def test_pull_prints_where_the_model_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr(sources, "resolve", lambda reference: Path("/cache") / reference)
    monkeypatch.setattr("paceline.server.log.configure_logging", lambda log_format: None)
    assert console.main(["pull", "some-model", *["--json"] * as_json]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out) == {"model": "some-model", "path": "/cache/some-model"}
    else:
        assert out == "/cache/some-model\n"
