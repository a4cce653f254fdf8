"""What is to be measured of a steered model: the command's options, checked before anything is loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from paceline.draftmodels.evaluate.steering.tasks import Score
from paceline.server.config import ModelSpec, PacelineConfig, SpeculationConfig, load_config, resolve
from paceline.server.config.schema import SteeringConfig
from paceline.server.config.steering import SELF
from paceline.server.errors import ConfigError

STEERED, EXPERT, TUNED = "steered", "expert", "tuned"
_NO_SPECULATION = SpeculationConfig(draft=None, ngram=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked measurement of one steered model.

    Attributes:
        config: resolved, without prefix caching; the models ``STEERED`` and, where there is one, ``EXPERT`` and
            ``TUNED``, these two without a draft.
        name: what the configuration calls the steered model.
        pair: the one whose strength sweeps; others keep theirs.
        strengths: of the sweep, ascending.
        data: file of the task.
        limit: most questions to take.
        stop: texts that end an answer.
        streams: requests in flight where answers are scored, and in the timed passes of many.
        timed: questions of the timed passes.
        rounds: timed passes of each kind; 0 scores only.
    """

    config: PacelineConfig
    name: str
    pair: SteeringConfig
    strengths: tuple[float, ...]
    data: Path
    score: Score
    limit: int | None
    max_tokens: int
    stop: tuple[str, ...]
    streams: int
    timed: int
    rounds: int

    @property
    def steered(self) -> ModelSpec:
        """The steered model."""
        return self.config.models[0]

    @property
    def models(self) -> dict[str, str]:
        """References of what is served, by name."""
        return {model.name: model.target for model in self.config.models}

    @property
    def parameter(self) -> str:
        """What the strength is called."""
        return "beta" if self.pair.mode == "amplify" else "alpha"


def find_steered(config: PacelineConfig, name: str | None, where: Path) -> ModelSpec:
    """The steered model of that name, or the only one.

    Raises:
        ConfigError: none, several, or one that is not steered.
    """
    steered = [model for model in config.models if model.steering]
    names = ", ".join(model.name for model in steered)
    if not steered:
        raise ConfigError(f"{where} steers no model: add a [[models.steering]] table to one")
    if name is None:
        if len(steered) > 1:
            raise ConfigError(f"{where} steers several models; choose one with --model: {names}")
        return steered[0]
    found = next((model for model in config.models if model.name == name), None)
    if found is None or not found.steering:
        what = "has no model" if found is None else "does not steer the model"
        raise ConfigError(f'--model: {where} {what} "{name}"; it steers: {names}')
    return found


def find_pair(model: ModelSpec, name: str | None) -> SteeringConfig:
    """The pair of that name, or the only one.

    Raises:
        ConfigError: no such pair, or several to choose from.
    """
    names = ", ".join(pair.name for pair in model.steering)
    if name is None and len(model.steering) > 1:
        raise ConfigError(
            f'the model "{model.name}" has several pairs; choose with --pair the one to sweep: {names}'
        )
    found = [pair for pair in model.steering if name in (None, pair.name)]
    if not found:
        raise ConfigError(f'--pair: the model "{model.name}" has no pair "{name}"; it has: {names}')
    return found[0]


def parse_strengths(text: str, pair: SteeringConfig) -> tuple[float, ...]:
    """The sweep from numbers between commas.

    Raises:
        ConfigError: no number, given twice, or outside the pair's limits.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f'--alphas: "{text}" is not a list such as 0,0.5,1') from None
    low, high = pair.limits
    for value in values:
        if not (isfinite(value) and low <= value <= high):
            raise ConfigError(
                f'--alphas: {value:g} is outside the limits [{low:g}, {high:g}] of pair "{pair.name}"; its table may '
                "widen them"
            )
    if len(set(values)) < len(values):
        raise ConfigError("--alphas names the same value twice")
    return tuple(sorted(values))


def served(
    config: PacelineConfig, model: ModelSpec, pair: SteeringConfig, tuned: str | None
) -> PacelineConfig:
    """The configuration of the measurement: one model under a name of its own, and what it is compared with."""
    plain = replace(model, steering=(), speculation=_NO_SPECULATION)
    expert = model.target if pair.expert == SELF else pair.expert
    beside: Sequence[tuple[str, str | None]] = ((EXPERT, expert), (TUNED, tuned))
    models = [replace(model, name=STEERED)]
    models += [
        replace(plain, name=name, target=reference) for name, reference in beside if reference is not None
    ]
    engine = replace(config.engine, prefix_caching=False)
    return resolve(replace(config, engine=engine, models=tuple(models)))


def read_config(path: Path) -> PacelineConfig:
    """The file as ``serve`` reads it, environment variables included."""
    return load_config(path, os.environ, {})
