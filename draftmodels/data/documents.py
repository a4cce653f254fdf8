"""Texts and conversations to learn from, as sequences of bounded length.

A ``.jsonl`` file has one JSON object per line: either ``text``, which is learnt as it stands, or a prompt with its
answer as ``data.prompts`` reads them (the answer must be there). Every other file is plain text, one text per line.
Texts longer than a sequence are cut into pieces; answers are cut short; prompts that leave no room for an answer are
left out.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.draftmodels.data.prompts import Template, lines_of, parse_object, parse_prompt
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """One line of a file.

    Attributes:
        tokens: of the prompt, or of a whole text: what it is held out by.
        sequences: a conversation's one, or the pieces of a text, each with a "prompt" of one token.
    """

    tokens: tuple[int, ...]
    sequences: tuple[TokenSequence, ...]


def read_documents(path: Path, tokenizer: Tokenizer, longest: int) -> list[Document]:
    """Read a file of texts or conversations.

    Args:
        longest: tokens of a sequence, at least 2.

    Raises:
        DataError: an unreadable file or line, named with its number, or nothing to learn from.
    """
    is_json = path.suffix == ".jsonl"
    read = [
        _parsed(parse_object(line, where), tokenizer, longest, where)
        if is_json
        else _text(line, tokenizer, longest)
        for where, line in lines_of(path)
    ]
    usable = [document for document in read if document.sequences]
    if not usable:
        raise DataError(f"{path} holds nothing to learn from within {longest} tokens")
    if len(usable) < len(read):
        _log.info(
            "%d of %d lines are left out: prompts of more than %d tokens, or texts of one",
            len(read) - len(usable),
            len(read),
            longest - 1,
        )
    return usable


def sequences_of(documents: Sequence[Document]) -> list[TokenSequence]:
    """All of them, in order."""
    return [sequence for document in documents for sequence in document.sequences]


def _parsed(entry: Mapping[str, Any], tokenizer: Tokenizer, longest: int, where: str) -> Document:
    if "text" not in entry:
        return conversation(entry, tokenizer, longest, where)
    text = entry["text"]
    if any(key in entry for key in ("prompt", "messages")):
        raise DataError(f"{where}: has both text and a prompt; keep one")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: text must be a text that is not empty")
    return _text(text, tokenizer, longest)


def conversation(
    entry: Mapping[str, Any],
    tokenizer: Tokenizer,
    longest: int,
    where: str,
    template: Template = "auto",
) -> Document:
    """A prompt with its answer, which is cut short; no sequences where the prompt leaves no room for one.

    Raises:
        DataError: see ``parse_prompt``; or there is no answer.
    """
    prompt = parse_prompt(entry, tokenizer, where, template)
    if not prompt.answer:
        raise DataError(f"{where}: has no answer to learn from; give one, or text instead of a prompt")
    if len(prompt.tokens) >= longest:
        return Document(prompt.tokens, ())
    whole = prompt.with_answer()
    return Document(prompt.tokens, (TokenSequence(whole.tokens[:longest], whole.prompt_tokens),))


def _text(text: str, tokenizer: Tokenizer, longest: int) -> Document:
    tokens = tuple(tokenizer.encode(text))
    pieces = (tokens[start : start + longest] for start in range(0, len(tokens), longest))
    return Document(tokens, tuple(TokenSequence(piece, 1) for piece in pieces if len(piece) > 1))
