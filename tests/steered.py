"""Steered models over tiny checkpoints, and what they should say by transformers, in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import spec
from transformers import AutoModelForCausalLM

from paceline.server.config.schema import ModelSpec, SteeringConfig
from paceline.server.engine.cpu_runner import CpuRunner
from paceline.server.engine.engine import Engine

#: Each mode as the paper has it, over the logits of base, expert and anti-expert.
FORMULAS: dict[str, Callable[..., Any]] = {
    "proxy": lambda m, e, a, x: m + x * (e - a),
    "amplify": lambda m, e, a, x: e + x * (m - a),
    "cfg": lambda m, e, a, x: m + x * (m - a),
}


def pair(name: str, anti_expert: Path | str, expert: Path | None = None, **keys: Any) -> SteeringConfig:
    return SteeringConfig(name, str(anti_expert), expert=None if expert is None else str(expert), **keys)


def steered_spec(target: Path, *pairs: SteeringConfig, name: str = "m", **settings: Any) -> ModelSpec:
    return replace(spec(target, name, **settings), steering=pairs)


def runners(engine: Engine, name: str = "m") -> list[Any]:
    """Those of a steered model: the target's, then the members' by index."""
    model = engine._models[name]
    assert model.steering is not None
    return [model.runner, *(member.runner for member in model.steering._members.values())]


def watch(runner: Any) -> list[int]:
    """A list that gets the token rows of each of the runner's forwards from now on."""
    rows: list[int] = []
    name = "prepare" if isinstance(runner, CpuRunner) else "forward"  # each of its forwards is prepared
    real = getattr(runner, name)

    def noted(batch: Any) -> Any:
        rows.append(len(batch.tokens))
        return real(batch)

    setattr(runner, name, noted)
    return rows


class Oracle:
    """Checkpoints as transformers runs them, in float64."""

    def __init__(self) -> None:
        self._models: dict[Path, Any] = {}

    def logits(self, path: Path, tokens: Sequence[int]) -> np.ndarray:
        """[len(tokens), vocab]."""
        if path not in self._models:
            self._models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        with torch.no_grad():
            return np.asarray(self._models[path](torch.tensor([tokens])).logits[0].numpy())

    def last(self, path: Path, tokens: Sequence[int]) -> np.ndarray:
        return np.asarray(self.logits(path, tokens)[-1])

    def greedy(
        self, formula: Any, prompts: Mapping[Path, Sequence[int]], max_tokens: int, eos: int | None = None
    ) -> list[int]:
        """A plain loop: run every model over its own prompt and the output, combine, take the argmax.

        Args:
            formula: maps the models' logits, in the order of ``prompts``, to the combination.
        """
        output: list[int] = []
        while len(output) < max_tokens:
            said = [self.last(path, [*prompt, *output]) for path, prompt in prompts.items()]
            width = min(map(len, said))
            output.append(int(formula(*(s[:width] for s in said)).argmax()))
            if output[-1] == eos:
                break
        return output
