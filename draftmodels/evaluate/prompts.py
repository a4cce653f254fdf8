"""Held-out prompts: the built-in set or a file, in the target's tokens, evenly over the categories.

A file is JSON Lines with ``{"prompt": ...}`` or ``{"messages": [...]}`` and optionally ``"category"``, as ``paceline
bench`` reads them; or text, a prompt per line. Knows nothing of engines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Protocol

from paceline.server.errors import ConfigError, InvalidRequestError

#: What stands for the built-in set on the command line, and how records name it.
BUILT_IN = "built-in"
BUILT_IN_DATASET = "paceline-chat"
#: Category of prompts that name none.
NO_CATEGORY = "other"

_EXAMPLE = 'write one JSON object per line, such as {"prompt": "Why is the sky blue?", "category": "knowledge"}'


class PromptTokenizer(Protocol):
    """What is needed of ``server.engine.interface.Tokenizer``."""

    has_chat_template: bool

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Prompt ids of a conversation."""
        ...


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """One prompt as written: a conversation that ends with the user's turn.

    Attributes:
        where: file and line, for error messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    category: str
    where: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in the target's tokens."""

    tokens: tuple[int, ...]
    category: str
    where: str


def read(source: str, limit: int | None = None) -> list[RawPrompt]:
    """Prompts of a file or the built-in set.

    Args:
        source: path, or ``built-in``.
        limit: how many to take at most, the categories in turn.

    Returns:
        Prompts in an order in which the categories alternate, so that parallel streams mix them.

    Raises:
        ConfigError: unreadable, empty, or a bad line (named with its number).
    """
    built_in = source == BUILT_IN
    text = files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8") if built_in else _text(source)
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompts: {source} holds no prompts; {_EXAMPLE}")
    as_json = built_in or source.endswith(".jsonl") or numbered[0][1].startswith("{")
    prompts = [
        _record(line, f"{source}:{number}") if as_json else _plain(line, f"{source}:{number}")
        for number, line in numbered
    ]
    return _alternate(prompts)[:limit]


def dataset(source: str) -> str:
    """How records name the set that ``source`` stands for; no folders, which differ from machine to machine."""
    return BUILT_IN_DATASET if source == BUILT_IN else Path(source).name


def tokenize(prompts: Sequence[RawPrompt], tokenizer: PromptTokenizer) -> list[Prompt]:
    """The prompts as the chat endpoint would send them; without a chat template as bare text of the last turn.

    Raises:
        ConfigError: the chat template refuses a conversation.
    """
    return [Prompt(tuple(_ids(p, tokenizer)), p.category, p.where) for p in prompts]


def _ids(prompt: RawPrompt, tokenizer: PromptTokenizer) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode(str(prompt.messages[-1]["content"]))
    try:
        return tokenizer.apply_chat_template(prompt.messages)
    except InvalidRequestError as error:
        raise ConfigError(f"--prompts: {prompt.where}: {error}") from error


def _text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts: {source} is not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"--prompts: {source}: {error.strerror or error}") from error


def _plain(line: str, where: str) -> RawPrompt:
    return RawPrompt(({"role": "user", "content": line},), NO_CATEGORY, where)


def _record(line: str, where: str) -> RawPrompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _bad(where, f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise _bad(where, 'needs exactly one of "prompt" and "messages"')
    category = record.get("category", NO_CATEGORY)
    if not isinstance(category, str) or not category:
        raise _bad(where, '"category" is not a text')
    if "messages" in record:
        return RawPrompt(_messages(record["messages"], where), category, where)
    if not isinstance(record["prompt"], str) or not record["prompt"]:
        raise _bad(where, '"prompt" is not a text')
    return RawPrompt(({"role": "user", "content": record["prompt"]},), category, where)


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Check the outline of a conversation; the chat template judges the rest."""
    if not isinstance(value, list) or not value:
        raise _bad(where, '"messages" is not a list of messages')
    for message in value:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise _bad(where, 'a message is not an object with the texts "role" and "content"')
    return tuple(value)


def _bad(where: str, problem: str) -> ConfigError:
    return ConfigError(f"--prompts: {where}: {problem}; {_EXAMPLE}")


def _alternate(prompts: Sequence[RawPrompt]) -> list[RawPrompt]:
    """Categories in turn, each in its own order."""
    groups: dict[str, list[RawPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return [p for p in chain.from_iterable(zip_longest(*groups.values())) if p is not None]
