"""Fields of the API that this version cannot honour: each is a 400 naming it, unless it asks for nothing.

One table per endpoint; remove a row when its feature is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paceline.server.api.chat_schemas import ChatBody
from paceline.server.api.schemas import CompletionBody, GenerationBody
from paceline.server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field, which of its values ask for nothing, and what to tell the client otherwise."""

    field: str
    asks_nothing: Callable[[Any], bool]
    message: str


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


_SHARED = (
    Refusal(
        "response_format",
        _one_of({"type": "text"}),
        '\'response_format\' other than {"type": "text"} is not supported yet by this version.',
    ),
    Refusal("prediction", _one_of(), "'prediction' is not supported yet by this version."),
)
_COMPLETION = (
    Refusal("suffix", _one_of(""), "'suffix' is not supported: the models complete at the end only."),
)
_CHAT = (
    Refusal("tools", _one_of([]), "'tools' are not supported yet by this version."),
    Refusal("tool_choice", _one_of("none"), "'tool_choice' is not supported yet by this version."),
    Refusal("functions", _one_of([]), "'functions' are not supported; they are the old form of 'tools'."),
    Refusal(
        "function_call", _one_of("none"), "'function_call' is not supported; it is the old 'tool_choice'."
    ),
    Refusal("modalities", _one_of(["text"], []), "'modalities' other than [\"text\"] are not supported."),
)


def check_refusals(body: GenerationBody) -> None:
    """Raise InvalidRequestError for the first field that cannot be honoured."""
    for refusal in _table(body):
        value = getattr(body, refusal.field)
        if value is not None and not refusal.asks_nothing(value):
            raise InvalidRequestError(refusal.message, param=refusal.field, code="unsupported_parameter")


def _table(body: GenerationBody) -> tuple[Refusal, ...]:
    if isinstance(body, ChatBody):
        return _SHARED + _CHAT
    return _SHARED + _COMPLETION if isinstance(body, CompletionBody) else _SHARED
