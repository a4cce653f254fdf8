"""The wheel, built from a copy of the tree once a session and laid out in a folder of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "server",
    "kernels",
    "draftmodels",
    "clients",
)


@dataclass(frozen=True)
class InstalledWheel:
    """A wheel and the folder that its files were installed into (no dependencies)."""

    file: Path
    site: Path

    def python(self, code: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run Python code from `/`, where the installed files are found before the editable install's."""
        env = {"PYTHONPATH": str(self.site), "COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *argv],
            cwd="/",
            env=os.environ | env,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> InstalledWheel:
    """Built in a copy: files of an older layout in the tree's own `build/` would end up in the wheel."""
    work = tmp_path_factory.mktemp("wheel")
    tree, site = work / "tree", work / "site"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy(source, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(tree)]
    # Nothing here runs the kernels: a compiler that does not optimise is done in a third of the time.
    _run(build, PACELINE_NATIVE_FLAGS="-O0")
    (wheel,) = work.glob("*.whl")
    _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)])
    return InstalledWheel(wheel, site)


@pytest.fixture(scope="session")
def command_help(installed_wheel: InstalledWheel) -> Callable[[str], str]:
    """``command_help("serve")`` -> what `paceline serve --help` prints when run out of the wheel.

    Commands of a group are named with it: ``command_help("evaluate draft")``.
    """
    known: dict[str, str] = {}

    def help_of(command: str) -> str:
        if command not in known:
            code = "import sys; from paceline.clients.console import main; sys.exit(main())"
            done = installed_wheel.python(code, *command.split(), "--help")
            assert done.returncode == 0, f"paceline {command} --help: {done.stderr}"
            known[command] = done.stdout
        return known[command]

    return help_of


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
