"""One value of one key: from TOML, an environment variable or a flag to the checked Python value.

``place`` is where the user wrote the value (``paceline.toml:server.port``, ``PACELINE_SERVER_PORT``,
``--port``) and begins every message, so that one line says what is wrong, where, and what would be right.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from paceline.server.config.schema import Key, Kind
from paceline.server.errors import ConfigError

_BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def convert(key: Key, value: object, place: str, *, text: bool) -> Any:
    """The value of ``key`` for what was written at ``place``.

    Args:
        text: the value comes from an environment variable or flag, so strings stand for numbers and switches.

    Raises:
        ConfigError: wrong type, out of range, or not available in this version.
    """
    if key.none_word is not None and value == key.none_word:
        return None
    if key.may_be_empty and value == "":
        return value
    if isinstance(value, str) and value in key.refused:
        raise ConfigError(f'{place}: "{value}" {key.refused[value]}')
    converted = _CONVERTERS[key.kind](value, text)
    if converted is None or not _allowed(key, converted):
        got = "" if key.secret else f", got {_shown(value)}"
        raise ConfigError(f"{place}: expected {expected(key)}{got}")
    return converted


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say to someone who wrote a name that is not known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"


def expected(key: Key) -> str:
    """What a key accepts, in words."""
    if key.kind == "choice":
        return _either([f'"{choice}"' for choice in key.choices])
    words = {
        "text": "a text" if key.may_be_empty else "a text that is not empty",
        "texts": "a list of texts that are not empty",
        "int": "a whole number",
        "float": "a number",
        "floats": "two numbers, the lesser first",
        "bool": "true or false",
    }[key.kind] + _range(key)
    return words if key.none_word is None else f'{words} or "{key.none_word}"'


def _range(key: Key) -> str:
    if key.above is not None:
        return f" above {key.above:g}" + ("" if key.high is None else f" and at most {key.high:g}")
    if key.low is not None and key.high is not None:
        return f" from {key.low:g} to {key.high:g}"
    return "" if key.low is None else f" of at least {key.low:g}"


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shown(value: object) -> str:
    """A short form of what was written; long values are cut so that the message stays one line."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    shown = shown.encode("unicode_escape").decode() if not shown.isprintable() else shown
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _allowed(key: Key, value: Any) -> bool:
    if key.kind == "choice":
        return value in key.choices
    if key.kind not in ("int", "float"):
        return True
    return (
        (key.low is None or value >= key.low)
        and (key.high is None or value <= key.high)
        and (key.above is None or value > key.above)
    )


def _text(value: object, text: bool) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: object, text: bool) -> tuple[str, ...] | None:
    if text and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple) or not all(_text(part, text) for part in value):
        return None
    return tuple(value)


def _int(value: object, text: bool) -> int | None:
    if text and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: object, text: bool) -> float | None:
    if text and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a TOML integer has no upper bound
        return None
    return number if math.isfinite(number) else None


def _floats(value: object, text: bool) -> tuple[float, float] | None:
    if text or not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = (_float(part, text) for part in value)
    return None if low is None or high is None or low > high else (low, high)


def _bool(value: object, text: bool) -> bool | None:
    if text and isinstance(value, str):
        return _BOOLS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


_CONVERTERS: Mapping[Kind, Callable[[object, bool], Any]] = {
    "text": _text,
    "texts": _texts,
    "int": _int,
    "float": _float,
    "floats": _floats,
    "bool": _bool,
    "choice": _text,
}
