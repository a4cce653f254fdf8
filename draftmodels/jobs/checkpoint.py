"""Checkpoints of a training job: complete or not there, also under kill -9.

A checkpoint is a folder ``checkpoint-STEP`` with the trained parameters and the optimiser's moments (safetensors) and
everything else (JSON). It is written beside, synced to disk and renamed; older ones go away afterwards. There is no
state of a random generator in it: everything random is a function of (seed, round), see ``data.seeds``.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from paceline.server.errors import ArtifactError

_NAME = re.compile(r"checkpoint-(\d+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHTS, _STATE = "training.safetensors", "state.json"


@dataclass
class JobState:
    """How far a job is; kinds of jobs add what they keep.

    Attributes:
        round, round_step: the round (or epoch) in work and how many of its steps are done.
        step, tokens, seconds: optimiser steps, trained tokens and seconds at work, in all.
        measured: every measurement, oldest first.
    """

    round: int = 0
    round_step: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measured: list[dict[str, Any]] = field(default_factory=list)


State = TypeVar("State", bound=JobState)


@dataclass(frozen=True)
class Loaded(Generic[State]):
    """A checkpoint that was read: see ``restore`` for the tensors."""

    state: State
    tensors: Mapping[str, Tensor]


def save_checkpoint(run: Path, state: JobState, tensors: Mapping[str, Tensor]) -> None:
    """Write ``checkpoint-STEP`` under ``run`` and remove older ones.

    Args:
        tensors: those of ``training_tensors``, and what else the job cannot work out again.

    Raises:
        ArtifactError: it cannot be written; the one before is still there.
    """
    from safetensors.torch import save_file

    final, temporary = run / f"checkpoint-{state.step}", run / f".checkpoint-{state.step}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(dict(tensors), temporary / _WEIGHTS)
        (temporary / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        for path in (temporary / _WEIGHTS, temporary / _STATE, temporary):
            _sync(path)
        old = _checkpoints(run)
        if final in old:  # the same step, for example after a measurement
            final.rename(old_place := run / f".replaced-{state.step}")
            old.append(old_place)
        temporary.rename(final)
        _sync(run)
    except OSError as error:
        raise ArtifactError(f"cannot write {final}: {error.strerror or error}") from error
    for folder in old:
        if folder != final:
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(run: Path, state_type: type[State]) -> Loaded[State] | None:
    """The newest checkpoint under ``run``, None if there is none.

    Raises:
        ArtifactError: it is not one of this version.
    """
    from safetensors.torch import load_file

    found = _checkpoints(run) or sorted(run.glob(".replaced-*"))
    if not found:
        return None
    folder = found[-1]
    try:
        state = state_type(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        return Loaded(state, load_file(folder / _WEIGHTS))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{folder} is not a checkpoint of this version: {error}") from error


def training_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters by name, and the optimiser's state of each as ``NAME@KIND``; on CPU."""
    return dict(_tensors(parameters, optimizer))


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put what ``training_tensors`` gave into the model and the optimiser.

    Raises:
        ArtifactError: it was made with another model.
    """
    if {name for name in tensors if "@" not in name} != set(parameters):
        raise ArtifactError(
            "the checkpoint is of another model; resume with the recipe that the run was started with"
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
        if f"{name}@step" in tensors:
            kinds = ("step", *_MOMENTS)
            optimizer.state[parameter] = {
                kind: tensors[f"{name}@{kind}"].to(parameter.device) for kind in kinds
            }


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        yield name, parameter.detach().cpu().contiguous()
        state = optimizer.state.get(parameter)
        for kind in ("step", *_MOMENTS) if state else ():
            assert state is not None
            yield f"{name}@{kind}", state[kind].detach().cpu().contiguous()


def _checkpoints(run: Path) -> list[Path]:
    """Complete ones, oldest first."""
    found = [(int(match[1]), path) for path in run.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
