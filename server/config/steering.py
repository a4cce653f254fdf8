"""Reads ``[[models.steering]]`` tables; what contradicts its mode is an error, not silently ignored."""

from typing import Any

from paceline.server.config.schema import SteeringConfig, keys_of
from paceline.server.config.values import convert, nearest
from paceline.server.errors import ConfigError

#: Anti-expert that is the target itself.
SELF = "self"
#: Keys that only some modes have a use for.
_ONLY_IN = {
    "expert": ("proxy", "amplify"),
    "expert_template": ("proxy", "amplify"),
    "response_prefix": ("proxy", "amplify"),
    "alpha": ("proxy", "cfg"),
    "beta": ("amplify",),
}


def read_steering(tables: object, place: str) -> tuple[SteeringConfig, ...]:
    """The pairs of a model.

    Args:
        tables: what the file has.
        place: where, for messages.

    Raises:
        ConfigError: unknown or missing key, wrong type, value out of range, keys that contradict each other.
    """
    if not isinstance(tables, list):
        raise ConfigError(f"{place}: write one [[models.steering]] table per pair")
    pairs = tuple(_pair(table, f"{place}[{index}]") for index, table in enumerate(tables))
    names = [pair.name for pair in pairs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(
                f'{place}[{index}].name: two pairs are called "{name}"; give each a name of its own'
            )
    return pairs


def _pair(table: object, place: str) -> SteeringConfig:
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: expected a table, got {table!r:.60}")
    known = keys_of("steering", SteeringConfig)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            raise ConfigError(f"{place}.{name}: unknown key; {nearest(name, known)}")
        values[name] = convert(known[name], value, f"{place}.{name}", text=False)
    for name in ("name", "anti_expert"):
        if name not in values:
            raise ConfigError(f"{place}: {name} is missing: {known[name].help}")
    pair = SteeringConfig(**values)
    _check(pair, values, place)
    return pair


def _check(pair: SteeringConfig, given: dict[str, Any], place: str) -> None:
    for name, modes in _ONLY_IN.items():
        if given.get(name) is not None and pair.mode not in modes:
            raise ConfigError(f'{place}.{name}: has no effect in mode "{pair.mode}"; remove it')
    if pair.expert is None and pair.mode != "cfg":
        raise ConfigError(f'{place}: expert is missing, which mode "{pair.mode}" needs')
    if pair.anti_expert == SELF and pair.anti_prompt is None and pair.mode != "proxy":
        raise ConfigError(
            f'{place}: anti_expert "self" differs from the target by anti_prompt only; add one (it may be empty)'
        )
    if pair.mode == "cfg" and pair.support == "expert_top_p":
        raise ConfigError(f'{place}.support: mode "cfg" has no expert; use "top_p" or "full"')
    if "support_top_p" in given and pair.support == "full":
        raise ConfigError(f'{place}.support_top_p: has no effect with support "full"; remove it')
    strength, (low, high) = strength_of(pair), pair.limits
    if not low <= strength <= high:
        name = "beta" if pair.mode == "amplify" else "alpha"
        raise ConfigError(f"{place}.{name}: {strength:g} is outside of limits [{low:g}, {high:g}]")


def strength_of(pair: SteeringConfig) -> float:
    """Alpha or beta, 1 where nothing is said."""
    own = pair.beta if pair.mode == "amplify" else pair.alpha
    return 1.0 if own is None else own
