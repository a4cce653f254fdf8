"""Prompts from files, as the server would see them, and which of them are held out for measuring.

A ``.jsonl`` file has one JSON object per line with ``prompt`` (a text) or ``messages`` (a conversation), and optionally
``answer`` or ``completion`` (a text), which a conversation may also end with, and ``category``; other keys are let be.
Every other file is plain text, one prompt per line. Empty lines count for nothing. A ``prompt`` is a user's message
where the target has a chat template, and the text itself where it has none; ``Template`` overrides that.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from paceline.draftmodels.data.seeds import derive_seed
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.templates import end_of_answer
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import DataError, InvalidRequestError

#: Category of prompts that name none.
NO_CATEGORY = "all"
_ANSWERS = ("answer", "completion")
#: How a ``prompt`` becomes ids: a user's message, the text itself, or the first where there is a chat template.
Template = Literal["auto", "chat", "plain"]


class Tokenized(Protocol):
    """What is known by its tokens."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids."""
        ...


_Item = TypeVar("_Item", bound=Tokenized)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids ready to be continued.

    Attributes:
        answer: the file's own answer, with the id that ends it; None without one.
    """

    tokens: tuple[int, ...]
    answer: tuple[int, ...] | None = None
    category: str = NO_CATEGORY

    def with_answer(self) -> TokenSequence:
        """Prompt and the file's own answer, which must be there."""
        assert self.answer is not None
        return TokenSequence((*self.tokens, *self.answer), len(self.tokens))


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        DataError: an unreadable file or line, named with its number, or a file without prompts.
    """
    is_json = path.suffix == ".jsonl"
    prompts = [
        parse_prompt(parse_object(line, where), tokenizer, where) if is_json else _plain(line, tokenizer)
        for where, line in lines_of(path)
    ]
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def split_held_out(prompts: Sequence[_Item], held_out: int, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Divide prompts into those to train on and those to measure with, each in the given order.

    Which side a prompt is on depends on its tokens, so that equal prompts are on one side; a held-out one is measured
    once.

    Args:
        held_out: how many different prompts to hold out.

    Returns:
        (for training, held out).

    Raises:
        DataError: nothing would be left to train on.
    """
    distinct = list(dict.fromkeys(prompt.tokens for prompt in prompts))
    if not 0 <= held_out < len(distinct):
        raise DataError(
            f"cannot hold out {held_out} of {len(distinct)} different prompts and train on the rest; "
            "hold out fewer or give more prompts"
        )
    ranked = sorted(distinct, key=lambda tokens: derive_seed(seed, "held out", *tokens))
    chosen = set(ranked[:held_out])
    kept: dict[tuple[int, ...], _Item] = {}
    for prompt in prompts:
        if prompt.tokens in chosen:
            kept.setdefault(prompt.tokens, prompt)
    return [prompt for prompt in prompts if prompt.tokens not in chosen], list(kept.values())


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(file and line number, text) of every line that is not empty.

    Raises:
        DataError: an unreadable file, or one that is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8"
                    ) from error
                if line:
                    yield where, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _plain(line: str, tokenizer: Tokenizer) -> Prompt:
    return Prompt(_encoded(line, tokenizer))


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        DataError: it is none.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}; a .jsonl file has one object per line") from error
    if not isinstance(entry, dict):
        raise DataError(f'{where}: must be an object such as {{"prompt": "..."}}')
    return entry


def parse_prompt(
    entry: Mapping[str, Any], tokenizer: Tokenizer, where: str, template: Template = "auto"
) -> Prompt:
    """A prompt, with its answer if there is one, from an object with the keys that the module's text names.

    Args:
        template: "chat" needs a tokenizer that has one.

    Raises:
        DataError: keys that are missing, contradict each other or hold something else.
    """
    if ("prompt" in entry) == ("messages" in entry):
        raise DataError(f"{where}: must have either prompt or messages")
    answer = _answer(entry, where)
    if "prompt" in entry:
        tokens = _encoded(_text(entry, "prompt", where), tokenizer, template)
    else:
        if template == "plain":
            raise DataError(f"{where}: messages need the chat template, but the template is to be plain")
        messages, last = _conversation(entry["messages"], where)
        if last is not None and answer is not None:
            raise DataError(
                f"{where}: messages end with the assistant's answer, so there cannot be another one"
            )
        tokens, answer = _templated(messages, tokenizer, where), last if answer is None else answer
    return Prompt(tokens, _ended(answer, tokenizer), _category(entry, where))


def _encoded(text: str, tokenizer: Tokenizer, template: Template = "auto") -> tuple[int, ...]:
    if tokenizer.has_chat_template and template != "plain":
        return tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
    return tuple(tokenizer.encode(text))


def _templated(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, where: str) -> tuple[int, ...]:
    if not tokenizer.has_chat_template:
        raise DataError(f"{where}: the target has no chat template for messages; give prompt instead")
    try:
        return tuple(tokenizer.apply_chat_template(messages))
    except InvalidRequestError as error:
        raise DataError(f"{where}: {error}") from error


def _conversation(value: Any, where: str) -> tuple[list[Mapping[str, Any]], str | None]:
    """Messages up to the one to be answered, and the answer if the assistant has the last word."""
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not good or not value:
        raise DataError(f"{where}: messages must be a list of objects with role and content, both texts")
    if value[-1]["role"] != "assistant":
        return value, None
    if len(value) == 1:
        raise DataError(f"{where}: messages hold an answer but nothing that it answers")
    return value[:-1], value[-1]["content"]


def _answer(entry: Mapping[str, Any], where: str) -> str | None:
    given = [name for name in _ANSWERS if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{where}: has both {' and '.join(given)}; keep one")
    return _text(entry, given[0], where) if given else None


def _ended(answer: str | None, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    if answer is None:
        return None
    return (*tokenizer.encode(answer, add_special_tokens=False), *end_of_answer(tokenizer))


def _category(entry: Mapping[str, Any], where: str) -> str:
    return NO_CATEGORY if entry.get("category") is None else _text(entry, "category", where)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be a text that is not empty")
    return value
