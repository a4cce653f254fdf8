"""``paceline serve --engine vllm`` under the interpreter that ``PACELINE_VLLM_PYTHON`` names (clients/README.md).

That environment has vLLM and no Paceline: this checkout is put on its path, with the metadata of the Paceline that runs
the tests. Nothing is installed there.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import pytest
from served_process import ServedProcess

ROOT = Path(__file__).parents[1]
_MAIN = "import sys; from paceline.clients.console import main; sys.exit(main())"


def vllm_python() -> str:
    """The interpreter; skips the test where there is none."""
    python = os.environ.get("PACELINE_VLLM_PYTHON")
    if not python:
        pytest.skip("PACELINE_VLLM_PYTHON names no interpreter with vLLM")
    return python


@contextmanager
def vllm_serve(folder: Path, config: str) -> Iterator[ServedProcess]:
    """A ready server on a free port; killed in the end if it still runs.

    Args:
        folder: empty; for its output and files.
        config: TOML without ``[server]``.
    """
    python = vllm_python()
    (folder / "paceline.toml").write_text(config, encoding="utf-8")
    command = [python, "-c", _MAIN, "serve", "--port", "0", "--config", str(folder / "paceline.toml")]
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # vLLM compiles with what is on its own
    process = ServedProcess(
        folder, command, PYTHONPATH=_site(folder), PATH=path, HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING"
    )
    try:
        process.until(lambda: "Try it" in process.out)
        yield process
    finally:
        process.kill()


def _site(folder: Path) -> str:
    """Where that interpreter finds Paceline and its metadata."""
    metadata = next(file for file in distribution("paceline").files or () if file.name == "METADATA")
    found = Path(str(metadata.locate())).parent
    shutil.copytree(found, folder / "site" / found.name)
    return os.pathsep.join((str(ROOT / ".typing"), str(folder / "site")))
