"""Long commands end with 130 where a library turned Ctrl-C into an error of its own."""

import importlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from paceline.clients import console
from paceline.draftmodels.jobs.ranks import Ranks

#: Command, the module that has it, where it finds its work, and the name of that.
COMMANDS = [
    ("train-draft", "train_cli", "distill.job", "run_job"),
    ("train-sparse", "train_sparse_cli", "sparse_finetune.job", "run_job"),
    ("train-expert", "train_expert_cli", "expert_finetune.job", "run_job"),
    ("sparsify", "prune.cli", "prune.job", "sparsify"),
]


def interrupted_in_a_library(*_: object, **__: object) -> NoReturn:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the signal ends it
    except BaseException:
        raise ValueError("could not determine the shape") from None
    raise AssertionError("no signal came")


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("command", "cli", "job", "name"), COMMANDS)
def test_a_command_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, cli: str, job: str, name: str
) -> None:
    module = importlib.import_module(f"paceline.draftmodels.{cli}")
    monkeypatch.setattr(module, "begin", lambda *_: (None, Ranks()), raising=False)
    monkeypatch.setattr(
        importlib.import_module(f"paceline.draftmodels.{job}"), name, interrupted_in_a_library
    )
    with pytest.raises(SystemExit) as ended:
        console.main([command, "model", "-o", str(tmp_path / "run")])
    assert ended.value.code == console.INTERRUPTED
