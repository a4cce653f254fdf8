"""Questions with answers, and how an answer is judged.

The formats are those of training files (``data.prompts``), with an answer in every line, and ``task`` as another word
for ``category``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from paceline.draftmodels.data.prompts import lines_of, parse_object, parse_prompt
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import DataError

#: exact: the text is the answer, but for white space around it; contains: the answer stands in the text, in whatever
#: case; number: the last number in the text is the last one in the answer.
Score = Literal["exact", "contains", "number"]
_ANSWERS = ("answer", "completion")
_NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a task.

    Attributes:
        tokens: the target's prompt.
        messages: the conversation that it is; None where the target has no chat template.
        text: what a plain prompt says; None of a conversation.
        where: file and line number.
    """

    tokens: tuple[int, ...]
    messages: Sequence[Mapping[str, Any]] | None
    text: str | None
    answer: str
    task: str
    where: str


def read_questions(path: Path, tokenizer: Tokenizer, score: Score, limit: int | None) -> list[Question]:
    """Read a task.

    Args:
        limit: how many to take at most, the tasks in turn.

    Returns:
        Questions in an order in which the tasks alternate.

    Raises:
        DataError: an unreadable file or line, named with its number; a line without an answer that can be judged.
    """
    if path.suffix != ".jsonl":
        raise DataError(f'{path}: a task is a .jsonl file of lines like {{"prompt": "...", "answer": "..."}}')
    groups: dict[str, list[Question]] = {}
    for where, line in lines_of(path):
        question = _question(parse_object(line, where), tokenizer, where)
        if score == "number" and last_number(question.answer) is None:
            raise DataError(f"{where}: the answer has no number, which --score number compares")
        groups.setdefault(question.task, []).append(question)
    if not groups:
        raise DataError(f"{path} holds no questions")
    return [q for q in chain.from_iterable(zip_longest(*groups.values())) if q is not None][:limit]


def is_right(text: str, answer: str, score: Score) -> bool:
    """Whether a text answers as ``answer`` does."""
    if score == "exact":
        return text.strip() == answer.strip()
    if score == "contains":
        return answer.strip().casefold() in text.casefold()
    return last_number(text) == last_number(answer)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None if it has none; commas may part its thousands."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _question(entry: dict[str, Any], tokenizer: Tokenizer, where: str) -> Question:
    if "task" in entry:
        if "category" in entry:
            raise DataError(f"{where}: has both task and category; keep one")
        entry["category"] = entry.pop("task")
    parsed = parse_prompt(entry, tokenizer, where)
    if parsed.answer is None:
        raise DataError(f"{where}: has no answer; every line of a task needs one")
    messages, text = entry.get("messages"), entry.get("prompt")
    answer = next((entry[name] for name in _ANSWERS if entry.get(name) is not None), None)
    if messages is not None and answer is None:
        *messages, last = messages
        answer = last["content"]
    if text is not None and tokenizer.has_chat_template:
        messages, text = [{"role": "user", "content": text}], None
    assert answer is not None
    return Question(parsed.tokens, messages, text, answer, parsed.category, where)
