"""What a load test asks: prompts from a file, or a small varied set that comes with the package.

Owns the file formats and their error messages. It must not know how requests are sent. A file is JSON Lines
with ``{"prompt": ...}`` or ``{"messages": [...]}`` and optionally ``"max_tokens"``; or text,
a prompt per line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Endpoint = Literal["chat", "completions"]

EXAMPLE = 'such as {"prompt": "Why is the sky blue?"} or {"messages": [{"role": "user", "content": "Hi"}]}'


class UsageError(ValueError):
    """Bad usage: a prompt file or an option that cannot be used; the text is one line for the user."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's input: exactly one of ``text`` and ``messages``."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The request fields that carry this prompt.

        Raises:
            UsageError: a conversation for the completions endpoint, which takes text only.
        """
        if endpoint == "chat":
            body: dict[str, Any] = {
                "messages": self.messages or [{"role": "user", "content": self.text}],
            }
        elif self.text is None:
            raise UsageError('a prompt with "messages" needs the chat endpoint: use --endpoint chat')
        else:
            body = {"prompt": self.text}
        return body if self.max_tokens is None else body | {"max_tokens": self.max_tokens}


def _bad(where: str, problem: str) -> UsageError:
    return UsageError(f"{where}: {problem}; write one JSON object per line, {EXAMPLE}")


def _messages(value: object, where: str) -> Sequence[Mapping[str, Any]]:
    """Check the outline of a conversation; the server judges the rest."""
    if not isinstance(value, list) or not value:
        raise _bad(where, '"messages" is not a non-empty list')
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad(where, 'a message is not an object with a "role"')
    return value


def _parse_record(line: str, where: str) -> Prompt:
    """One line of a JSON Lines file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _bad(where, f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise _bad(where, "not an object")
    if ("prompt" in record) == ("messages" in record):
        raise _bad(where, 'needs exactly one of "prompt" and "messages"')
    max_tokens = record.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise _bad(where, f'"max_tokens" is {max_tokens!r}, not a positive whole number')
    if "messages" in record:
        return Prompt(messages=_messages(record["messages"], where), max_tokens=max_tokens)
    if not isinstance(record["prompt"], str) or not record["prompt"]:
        raise _bad(where, '"prompt" is not a non-empty string')
    return Prompt(text=record["prompt"], max_tokens=max_tokens)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a file. It is JSON Lines if it is named ``*.jsonl`` or its first line starts with ``{``.

    Other keys of a record (ids, labels) are left alone, as data sets carry many.

    Raises:
        UsageError: unreadable, not UTF-8, empty, or a bad line (named with its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text at byte {error.start}; convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; check the path given to --prompts") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"{path}: holds no prompts; write one per line")
    if path.suffix == ".jsonl" or numbered[0][1].startswith("{"):
        return tuple(_parse_record(line, f"{path}:{number}") for number, line in numbered)
    return tuple(Prompt(text=line) for _, line in numbered)


#: Varied on purpose: prose, lists, code, arithmetic, translation, long and short questions.
BUILT_IN: tuple[Prompt, ...] = tuple(
    Prompt(text=text)
    for text in (
        "What is the capital of France, and what is it known for?",
        "Explain to a ten-year-old why the sea is salty but most rivers are not.",
        "Write a Python function that returns the longest word of a sentence, with two examples.",
        "List eight things to check before buying a used bicycle, one line each.",
        "A train leaves at 9:40 and arrives at 13:05. It stops twice for 7 minutes. How long does it move?",
        "Write a polite e-mail to a landlord asking to have a dripping kitchen tap repaired this week.",
        "Summarise in three sentences: Bees find flowers by sight and smell. A scout that has found "
        "a rich meadow returns to the hive and dances. The angle of the dance shows the direction to the "
        "sun, its length the distance. Other bees follow the dancer, then mostly find the meadow.",
        "Translate into Spanish, French and German: The library closes when the last reader leaves.",
        "Tell a short story about a lighthouse keeper whose lamp has been answering someone.",
        "What is the difference between a process and a thread? When is each the better choice?",
        "Write a SQL query that lists the five customers with the highest total order value in 2024.",
        "Give a recipe for lentil soup for four people with quantities and numbered steps.",
        "Compare electric and diesel buses for a small town: cost, noise, range and repairs.",
        "Continue the pattern and explain it: 2, 6, 12, 20, 30,",
        "Write a JSON object that describes a book: title, authors, year, three topics and an ISBN.",
        "How do vaccines teach the body to recognise a virus? Answer in one paragraph.",
    )
)
