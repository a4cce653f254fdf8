"""Examples to learn from: prompts with answers and conversations, as sequences that end in the end-of-answer id.

A conversation gives one sequence per turn of the assistant: what came before it, as the chat template shows it when the
turn is to be written, and the turn. So every turn is learnt as it will be asked for, also with templates that show
earlier turns otherwise than they were written.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paceline.draftmodels.data.documents import Document, conversation
from paceline.draftmodels.data.prompts import Template, lines_of, parse_object
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.templates import end_of_answer
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import ConfigError, DataError, InvalidRequestError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """Reads examples for one model.

    Attributes:
        longest: tokens of a sequence, at least 2.
    """

    tokenizer: Tokenizer
    longest: int
    template: Template = "auto"

    @cached_property
    def _end(self) -> tuple[int, ...]:
        return end_of_answer(self.tokenizer)

    def check(self, model: str) -> None:
        """Refuse a model that cannot learn from such examples.

        Raises:
            ConfigError: no chat template where one is asked for, or no id that ends an answer.
        """
        if self.template == "chat" and not self.tokenizer.has_chat_template:
            raise ConfigError(f"--template chat: {model} has no chat template; use plain")
        if not self._end:
            raise ConfigError(
                f"MODEL: {model} names no end-of-sequence id, so that it could never learn to end an answer; set "
                "eos_token_id in its config.json"
            )

    def read(self, path: Path) -> list[Document]:
        """The examples of a file, one document per line.

        Raises:
            DataError: an unreadable file or line, named with its number, or nothing to learn from.
        """
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: examples must be in a .jsonl file, one object per line")
        lines = [self._turns(parse_object(line, where), where) for where, line in lines_of(path)]
        usable = [document for turns in lines if (document := _joined(turns)).sequences]
        if not usable:
            raise DataError(f"{path} holds nothing to learn from within {self.longest} tokens")
        self._tell([turn for turns in lines for turn in turns])
        return usable

    def is_whole(self, sequence: TokenSequence) -> bool:
        """Whether an answer was not cut short."""
        return sequence.tokens[-1:] == self._end

    def _turns(self, entry: Mapping[str, Any], where: str) -> list[Document]:
        try:
            return [
                conversation(turn, self.tokenizer, self.longest, where, self.template)
                for turn in _turns(entry, where)
            ]
        except InvalidRequestError as error:  # text that has no ids, or a template that refuses it
            raise DataError(f"{where}: {error}") from error

    def _tell(self, turns: Sequence[Document]) -> None:
        left_out = sum(not turn.sequences for turn in turns)
        if left_out:
            _log.warning("%d prompts of more than %d tokens are left out", left_out, self.longest - 1)
        cut = sum(not self.is_whole(sequence) for turn in turns for sequence in turn.sequences)
        if cut:
            _log.warning(
                "%d answers are cut short, as they are longer than --sequence-tokens %d", cut, self.longest
            )


def _joined(turns: Sequence[Document]) -> Document:
    """A line's turns as one document, which is held out, or not, as a whole."""
    return Document(turns[-1].tokens, tuple(own for turn in turns for own in turn.sequences))


def _turns(entry: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    """One entry per turn of the assistant; other entries as they are."""
    messages = entry.get("messages")
    if isinstance(messages, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        asked = bool(roles) and roles[-1] not in ("assistant", None)
        if asked and not any(entry.get(key) for key in ("answer", "completion")):
            raise DataError(
                f"{where}: messages must end with the assistant's answer, which is what is learnt"
            )
        earlier = [i for i, role in enumerate(roles[:-1]) if role == "assistant" and i]
        yield from ({"messages": messages[: i + 1]} for i in earlier)
    yield entry
