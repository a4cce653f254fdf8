"""Held-out text for a student's losses, and the cloze task made of it.

A ``.jsonl`` file holds prompts with answers (formats: ``data.prompts``); its answers count. Every other file is running
text in UTF-8, cut into windows. The task is last-word prediction as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031,
scored by greedy match as evaluation harnesses do): the last word of a sentence, given all text of the window before it,
is right if each of its tokens is the most probable one.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from paceline.draftmodels.data.prompts import read_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import DataError
from paceline.server.models.quality import WINDOW_TOKENS, calibration_text, split

#: What stands for the built-in text on the command line, and how records name it.
BUILT_IN = "built-in"
BUILT_IN_DATASET = "paceline-text"
#: Fewer tokens before a word leave it to chance.
MIN_CONTEXT_TOKENS = 16
_LAST_WORD = re.compile(r"(?<=\s)(\w+)(?=[.!?][\"'”’)\]]*(?:\s|$))")


def read_text(
    source: str, tokenizer: Tokenizer, limit_tokens: int, context_length: int
) -> list[TokenSequence]:
    """Sequences of a file or the built-in text, in order, until the limit.

    Args:
        limit_tokens: of tokens that count.
        context_length: longest sequence; what is longer is cut.

    Raises:
        DataError: unreadable, or nothing that can be measured on.
    """
    if source != BUILT_IN and Path(source).suffix == ".jsonl":
        prompts = read_prompts(Path(source), tokenizer)
        found = [prompt.with_answer() for prompt in prompts if prompt.answer]
        fits = [s for s in found if s.prompt_tokens < context_length]
        sequences = [TokenSequence(s.tokens[:context_length], s.prompt_tokens) for s in fits]
    else:
        text = calibration_text() if source == BUILT_IN else _read(Path(source))
        sequences = _windows(text, tokenizer, min(WINDOW_TOKENS, context_length))
    chosen = list(_until(sequences, limit_tokens))
    if not chosen:
        raise DataError(
            f"{source} holds no text to measure on: a .jsonl file needs answers, other files text"
        )
    return chosen


def dataset(source: str) -> str:
    """How records name the text; no folders, which differ from machine to machine."""
    return BUILT_IN_DATASET if source == BUILT_IN else Path(source).name


def last_words(sequence: TokenSequence, tokenizer: Tokenizer) -> list[range]:
    """Token positions of the last words of the sentences that count, each of whole tokens."""
    pieces = [tokenizer.token_bytes(token) for token in sequence.tokens]
    starts, ends, at = {}, {}, 0
    for index, piece in enumerate(pieces):
        # A token may bring the space before its word along.
        starts.setdefault(at + len(piece) - len(piece.lstrip(b" ")), index)
        at += len(piece)
        ends[at] = index + 1
    text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    first = max(sequence.prompt_tokens, MIN_CONTEXT_TOKENS)
    found = []
    for match in _LAST_WORD.finditer(text):
        begin, end = (len(text[:i].encode("utf-8", errors="surrogateescape")) for i in match.span(1))
        if begin in starts and end in ends and starts[begin] >= first:
            found.append(range(starts[begin], ends[end]))
    return found


def _windows(text: str, tokenizer: Tokenizer, length: int) -> list[TokenSequence]:
    """Each begins as the tokenizer begins a text; what is given does not count."""
    begin = tokenizer.encode("")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    given = max(1, len(begin))
    return [TokenSequence((*begin, *window), given) for window in split(tokens, max(2, length - len(begin)))]


def _until(sequences: Sequence[TokenSequence], limit: int) -> Iterator[TokenSequence]:
    for sequence in sequences:
        if limit <= 0:
            return
        kept = sequence.tokens[: sequence.prompt_tokens + limit]
        if len(kept) > sequence.prompt_tokens:
            yield TokenSequence(kept, sequence.prompt_tokens)
        limit -= sequence.answer_tokens


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
