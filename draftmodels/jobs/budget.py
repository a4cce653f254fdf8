"""How long a training job may run: time, trained tokens or steps, whichever ends first; and early stopping.

Amounts are texts in recipes ("20m", "2M", "500"). Time counts while the job runs, also over restarts. Knows no clock
of its own: the trainer says how much was used.
"""

import re
from dataclasses import dataclass

from paceline.server.errors import ConfigError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_COUNTS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}


def parse_seconds(text: str, place: str) -> float:
    """Seconds of "90", "90s", "20m", "1.5h", "1h30m" or "2d".

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        text += "s"
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise ConfigError(f'{place}: expected a time such as 90s, 20m or 1h30m, got "{text}"')
    seconds = sum(
        float(number) * _SECONDS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text)
    )
    return _above_zero(seconds, text, place)


def parse_count(text: str, place: str) -> int:
    """A number such as "500", "300k", "2M" or "1.5M".

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        raise ConfigError(f'{place}: expected a number such as 500, 300k or 2M, got "{text}"')
    return int(_above_zero(float(match[1]) * _COUNTS[match[2]], text, place))


def _above_zero(amount: float, text: str, place: str) -> float:
    if amount <= 0:
        raise ConfigError(f'{place}: "{text}" is nothing; name an amount above 0')
    return amount


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits; None is no limit, and at least one is given."""

    seconds: float | None = None
    tokens: int | None = None
    steps: int | None = None

    def used(self, *, seconds: float, tokens: int, steps: int) -> float:
        """The used share of the limit that is nearest, 1 and above: over."""
        pairs = ((seconds, self.seconds), (tokens, self.tokens), (steps, self.steps))
        return max(amount / limit for amount, limit in pairs if limit is not None)

    def seconds_left(self, *, seconds: float, tokens: int, steps: int) -> float:
        """An estimate, from the pace so far; infinite before anything was done."""
        share = self.used(seconds=seconds, tokens=tokens, steps=steps)
        return seconds * max(1 - share, 0.0) / share if share > 0 else float("inf")

    def steps_left(self, *, seconds: float, tokens: int, steps: int, step_tokens: int) -> float:
        """Steps to come; where the limit is not one of steps, an estimate from the pace so far.

        Args:
            step_tokens: of a step, for as long as there is no pace.
        """
        limits: list[float] = []
        if self.steps is not None:
            limits.append(self.steps - steps)
        if self.tokens is not None:
            limits.append((self.tokens - tokens) / (tokens / steps if steps else step_tokens))
        if self.seconds is not None and steps:
            limits.append((self.seconds - seconds) * steps / max(seconds, 1e-9))
        return min(limits, default=float("inf"))


@dataclass(frozen=True, slots=True)
class Patience:
    """Stop when the best of the latest ``evaluations`` measurements is no better than what came before; 0 is never.

    Attributes:
        least_gain: what counts as better, in units of the score.
    """

    evaluations: int = 0
    least_gain: float = 0.005

    def exhausted(self, scores: list[float]) -> bool:
        """Whether to stop after these measurements of a score, oldest first; higher is better."""
        if not self.evaluations or len(scores) <= self.evaluations:
            return False
        return max(scores[-self.evaluations :]) < max(scores[: -self.evaluations]) + self.least_gain
