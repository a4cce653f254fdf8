"""What a user gets from the wheel: every module imports, nothing foreign is overwritten, commands answer."""

import json
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = PROJECT["entry-points"]["paceline.commands"]

#: Prints where each module named on the command line was imported from.
IMPORT_EVERYTHING = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


class InstalledWheel(Protocol):
    file: Path
    site: Path

    def python(self, code: str, *argv: str) -> "Finished": ...


class Finished(Protocol):
    returncode: int
    stdout: str
    stderr: str


def files_in(wheel: Path) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]


def test_only_the_umbrella_package_is_at_the_top(installed_wheel: InstalledWheel) -> None:
    tops = {path.parts[0] for path in files_in(installed_wheel.file)}
    assert tops == {"paceline", f"paceline-{PROJECT['version']}.dist-info"}


def test_every_source_file_is_in_the_wheel(installed_wheel: InstalledWheel) -> None:
    """Modules and the data beside them (catalog, native sources, drafts with their cards), but no other documents, no
    bench records and no builds."""
    files = {path for path in files_in(installed_wheel.file) if path.parts[0] == "paceline"}
    inside = {path for path in files if path.suffix != ".so"}
    wanted = {
        PurePosixPath("paceline", path.relative_to(ROOT).as_posix())
        for top in ("server", "kernels", "draftmodels", "clients")
        for path in (ROOT / top).rglob("*")
        if path.is_file()
        and (path.suffix not in (".md", ".pyc", ".so", ".o") or path.parent.parent.name == "pretrained")
        and path.parent.name != "results"
    }
    assert PurePosixPath("paceline/server/models/catalog.toml") in wanted
    assert inside == wanted


def test_licence_is_in_the_wheel(installed_wheel: InstalledWheel) -> None:
    assert [path for path in files_in(installed_wheel.file) if path.name == "LICENSE"]


def modules_in(wheel: Path) -> list[str]:
    """All that an installation with our own extras can import: vLLM has an environment of its own."""
    paths = [path.with_suffix("") for path in files_in(wheel) if path.suffix == ".py"]
    names = [".".join(path.parent.parts if path.name == "__init__" else path.parts) for path in paths]
    return [name for name in names if name != "paceline.server.backends.vllm.connect"]


def test_every_module_imports_from_the_wheel_and_prints_nothing(installed_wheel: InstalledWheel) -> None:
    names = modules_in(installed_wheel.file)
    done = installed_wheel.python(IMPORT_EVERYTHING, *names)
    assert done.returncode == 0, done.stderr
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
    origins: dict[str, str] = json.loads(done.stdout)
    assert len(origins) == len(names) > 10
    assert {
        name for name, file in origins.items() if not Path(file).is_relative_to(installed_wheel.site)
    } == set()


def test_the_sdk_imports_without_torch_or_fastapi(installed_wheel: InstalledWheel) -> None:
    code = "import sys, paceline.clients.client, paceline.clients.async_client, paceline.clients.load\n"
    done = installed_wheel.python(
        code + "print({'torch', 'fastapi', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command_help: Callable[[str], str], command: str) -> None:
    text = command_help(command)
    assert f"paceline {command}" in text
    assert "--help" in text


def test_the_script_lists_every_command(installed_wheel: InstalledWheel) -> None:
    module, _, function = PROJECT["scripts"]["paceline"].partition(":")
    done = installed_wheel.python(
        f"import sys; from {module} import {function} as m; sys.exit(m())", "--help"
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout, command
