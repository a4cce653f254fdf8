"""Command-line flags made from configuration keys, so that every key has one.

Owns how a key looks on the command line; values stay texts, as it is the configuration that checks them.
"""

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar

import typer

from paceline.server.config.load import DEFAULT_TARGET
from paceline.server.config.schema import Key

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_flags(known: Callable[[], Iterable[Key]]) -> Callable[[_Command], _Command]:
    """Give a command one parameter per configuration key beside its own; they arrive as keywords."""

    def decorate(command: _Command) -> _Command:
        parameters = Signature.from_callable(command).parameters.values()
        own = [parameter for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD]
        of_keys = [_parameter(key) for key in sorted(known(), key=_is_flag)]  # the positional one first
        command.__signature__ = Signature([*own, *of_keys])  # type: ignore[attr-defined]
        return command

    return decorate


def _is_flag(key: Key) -> bool:
    return key.flag.startswith("--")


def _parameter(key: Key) -> Parameter:
    """A parameter that is None unless given; texts, as it is the configuration that checks them."""
    types: dict[str, Any] = {"bool": bool | None, "texts": list[str] | None}
    annotation: Any = Annotated[
        types.get(key.kind, str | None), _option(key) if _is_flag(key) else _argument(key)
    ]
    return Parameter(key.param, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _argument(key: Key) -> Any:
    return typer.Argument(
        help=f"{key.help} [default: {DEFAULT_TARGET}]", metavar=key.flag, show_default=False
    )


def _option(key: Key) -> Any:
    names = f"{key.flag}/--no-{key.flag.removeprefix('--')}" if key.kind == "bool" else key.flag
    return typer.Option(
        names,
        help=key.help + _default(key),
        metavar=None if key.kind == "bool" else _metavar(key),
        show_default=False,
    )


def _metavar(key: Key) -> str:
    words = {
        "text": "TEXT",
        "texts": "TEXT",
        "int": "INTEGER",
        "float": "NUMBER",
        "choice": "|".join(key.choices),
    }
    return words[key.kind] + (f"|{key.none_word}" if key.none_word else "")


def _default(key: Key) -> str:
    """The default as a user would write it; nothing for keys whose default is worked out or empty."""
    default = key.none_word if key.default is None else key.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" [default: {default}]" if isinstance(default, str | int | float) else ""
