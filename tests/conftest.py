"""What every test runs under: no hub, quiet libraries, one torch thread, and shared tiny checkpoints."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read once when these libraries are imported, hence before the imports below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Whatever imports triton first in this process: there is no GPU that it could compile for.
os.environ["TRITON_INTERPRET"] = "1"

import campaign
import pytest
import real_models
import tiny
import torch

# Tests measure nothing, and a 64-wide model is quicker on one thread than on the hand-over between two.
torch.set_num_threads(1)

TinyCheckpoint = Callable[..., Path]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In a full campaign, what its tests recorded: test, name, value."""
    reports = [
        r for some in terminalreporter.stats.values() for r in some if isinstance(r, pytest.TestReport)
    ]
    for report in reports if campaign.FULL else ():
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}  {name} = {value}")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as on a terminal; a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """``tiny_checkpoint(arch="llama", seed=0, **overrides)`` -> folder, built once; don't write into it."""
    built: dict[str, Path] = {}

    def build(arch: tiny.Arch = "llama", seed: int = 0, **overrides: Any) -> Path:
        key = repr((arch, seed, sorted(overrides.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp(f"tiny-{arch}")
            built[key] = tiny.write_tiny_checkpoint(folder, arch, seed, **overrides)
        return built[key]

    return build


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """``real_model(name)`` -> file or folder of a catalog model's real weights, downloaded if need be."""
    return real_models.real_model
