"""What is to be measured: the command's options, checked before anything is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from paceline.draftmodels.targets import is_configured, target_spec
from paceline.server.config import PacelineConfig, SpeculationConfig, load_config, resolve
from paceline.server.config.schema import EXPERT_DRAFT
from paceline.server.errors import ConfigError

_HOTTEST = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked measurement of one draft, or of two by turns.

    Attributes:
        config: resolved; one model that speculates, and perhaps the same with another draft; without prefix caching, so
            that every pass pays for its prompts.
        prompts: path, or ``built-in``.
        limit: most prompts to take.
        temperatures: each different.
        seed: prompt i is sampled with seed + i; None is unseeded.
        streams: requests in flight.
        rounds: of timed passes, with and without speculation and with the other draft; 0 measures acceptance only.
    """

    config: PacelineConfig
    prompts: str
    limit: int | None
    max_tokens: int
    temperatures: tuple[float, ...]
    seed: int | None
    streams: int
    rounds: int

    @property
    def speculation(self) -> SpeculationConfig:
        """The model's settings."""
        return self.config.models[0].speculation

    @property
    def draft(self) -> str:
        """Reference of the draft."""
        assert self.speculation.draft is not None
        return self.speculation.draft

    @property
    def against(self) -> str | None:
        """Reference of the draft that takes turns with it."""
        return self.config.models[1].speculation.draft if len(self.config.models) > 1 else None

    @property
    def turns_within(self) -> str:
        """Where the variants take turns: within each ``prompt`` (one stream), or pass by pass within each ``round``."""
        return "prompt" if self.streams == 1 else "round"

    @property
    def passes(self) -> int:
        """How often every prompt is answered."""
        drafts = len(self.config.models)
        return len(self.temperatures) * (drafts + (drafts + 1) * self.rounds)


def make_config(flags: Mapping[str, str | None], against: str | None = None) -> PacelineConfig:
    """The server's own configuration for these flags, environment variables included, but without prefix caching.

    Args:
        against: another draft, which a second model speculates with; the first's weights are its own, too.

    Raises:
        ConfigError: a bad value, or no draft.
    """
    config = _of_one(flags, "--draft")
    if config.models[0].speculation.draft is None:
        raise ConfigError("--draft none leaves nothing to measure; name a draft model, or ngram")
    if against is not None:
        (other,) = _of_one({**flags, "draft": against}, "--against").models
        if other.speculation.draft is None:
            raise ConfigError("--against none: no speculation is timed anyway; name a draft, or leave it out")
        config = replace(config, models=(*config.models, replace(other, name=f"{other.name} against")))
    return resolve(replace(config, engine=replace(config.engine, prefix_caching=False)))


def _of_one(flags: Mapping[str, str | None], option: str) -> PacelineConfig:
    """The configuration for a draft that ``option`` named."""
    if is_configured(flags["model"] or ""):
        return _configured(flags, option)
    return load_config(None, os.environ, flags)


def _configured(flags: Mapping[str, str | None], option: str) -> PacelineConfig:
    """A model of a configuration file, with the speculation that flags ask for in place of its own."""
    spec = target_spec(flags["model"] or "")
    expert = flags["draft"] == EXPERT_DRAFT
    config = load_config(
        None, os.environ, {**flags, "model": spec.target, "draft": "none" if expert else flags["draft"]}
    )
    (given,) = config.models
    if expert and not any(pair.expert for pair in spec.steering):
        raise ConfigError(f"{option} expert: no pair with an expert steers the model {spec.name}")
    speculation = replace(given.speculation, draft=EXPERT_DRAFT) if expert else given.speculation
    weights = spec.weights if given.weights == "auto" else given.weights
    return replace(config, models=(replace(spec, weights=weights, speculation=speculation),))


def check_sampling(temperatures: Sequence[float], seed: int | None) -> None:
    """Refuse temperatures and seeds that contradict each other.

    Raises:
        ConfigError: out of range, given twice, or a seed that could do nothing.
    """
    for value in temperatures:
        if not (isfinite(value) and 0 <= value <= _HOTTEST):
            raise ConfigError(f"--temperature {value:g} is not between 0 and {_HOTTEST:g}")
    if len(set(temperatures)) < len(temperatures):
        raise ConfigError("--temperature names the same value twice")
    if seed is not None and not any(temperatures):
        raise ConfigError("--seed does nothing at temperature 0; add a --temperature above 0 or leave it out")
