"""The ``paceline`` script: lists and loads commands, and turns whatever happens into an exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from paceline.clients import console
from paceline.server.errors import ChecksumError, ConfigError

COMMANDS = ("bench", "info", "models", "pull", "serve")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Make ``paceline do`` run a function of this test."""

    def register(function: Callable[..., object]) -> None:
        point = EntryPoint("do", f"{__name__}:do", console.GROUP)
        monkeypatch.setattr(console, "_points", lambda: {"do": point})
        monkeypatch.setattr(console, "_summary", lambda point: "")
        monkeypatch.setattr(console, "_load", lambda point: console._command("do", function))

    return register


def raises(error: BaseException) -> Callable[[], NoReturn]:
    def do() -> NoReturn:
        raise error

    return do


def test_every_command_is_listed_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--help"]) == 0
    lines = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()
    }
    for name in COMMANDS:
        assert len(lines[name]) > 2, f"{name} has no help"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main([]) == 0
    assert "Usage: paceline" in capsys.readouterr().out


def test_help_imports_no_component() -> None:
    code = (
        "import sys; from paceline.clients.console import main; code = main(['--help']); "
        "assert code == 0; heavy = {'torch', 'fastapi', 'openai', 'httpx', 'paceline.server.cli'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"paceline {version('paceline')}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ChecksumError("a.gguf: wrong hash"), 1, "paceline: a.gguf: wrong hash\n"),
        (ConfigError("--port: bad"), 2, "paceline: --port: bad\n"),
        (
            typer.BadParameter("no such size"),
            2,
            "paceline do: Invalid value: no such size (see paceline do --help)\n",
        ),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    command: Callable[[Callable[..., object]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    command(raises(error))
    assert console.main(["do"]) == code
    assert capsys.readouterr() == ("", line)


def test_an_unexpected_error_keeps_its_traceback(command: Callable[[Callable[..., object]], None]) -> None:
    command(raises(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        console.main(["do"])


def test_an_interrupt_is_130(command: Callable[[Callable[..., object]], None]) -> None:
    command(raises(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as caught:
        console.main(["do"])
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("module", "component", "line"),
    [
        ("fastapi", "server", "paceline do needs the server extra: pip install 'paceline[server]'\n"),
        (
            "huggingface_hub.utils",
            "server",
            "paceline do needs the server extra: pip install 'paceline[server]'\n",
        ),
        ("xllamacpp", "clients", "paceline do needs the bench extra: pip install 'paceline[bench]'\n"),
    ],
)
def test_a_missing_extra_is_named(
    command: Callable[[Callable[..., object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    component: str,
    line: str,
) -> None:
    command(raises(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    point = EntryPoint("do", f"paceline.{component}.cli:do", console.GROUP)
    monkeypatch.setattr(console, "_points", lambda: {"do": point})
    with pytest.raises(SystemExit) as caught:
        console.main(["do"])
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", line)


def test_a_module_that_no_extra_brings_is_our_bug(command: Callable[[Callable[..., object]], None]) -> None:
    command(raises(ModuleNotFoundError("No module named 'nothing'", name="nothing")))
    with pytest.raises(ModuleNotFoundError):
        console.main(["do"])


def test_serve_without_its_extra(tmp_path: Path) -> None:
    """uvicorn hidden, as in an install without the server extra."""
    code = (
        "import sys; sys.modules['uvicorn'] = None; from paceline.clients.console import main; "
        "sys.exit(main(['serve', '--port', '0']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "paceline serve needs the server extra: pip install 'paceline[server]'\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["srve"], "paceline: No such command 'srve'. "),
        (
            ["serve", "--port"],
            "paceline serve: Option '--port' requires an argument. (see paceline serve --help)\n",
        ),
        (["serve", "--port", "x"], 'paceline: --port: expected a whole number from 0 to 65535, got "x"\n'),
        (["serve", "--json", "--log-format", "text"], "paceline: --json: contradicts --log-format text; "),
        (["pull"], "paceline pull: Missing argument 'MODEL'. (see paceline pull --help)\n"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert console.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


def test_the_script_as_a_process() -> None:
    """Exit code and stderr arrive where a shell sees them."""
    code = "import sys; from paceline.clients.console import main; sys.exit(main())"
    for arguments, expected in (
        (["models", "--json"], 0),
        (["pull", "no-such-model"], 1),
        (["info", "--x"], 2),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == expected, result.stderr
        assert len(result.stderr.splitlines()) == (expected != 0)
        if expected == 0:
            assert "smollm2-135m-instruct" in {entry["name"] for entry in json.loads(result.stdout)}
