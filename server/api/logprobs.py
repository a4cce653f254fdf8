"""Log-probabilities on the wire: the two shapes of completions and chat, and text offsets.

Token labels are the token's own text. A token that is a fragment of a UTF-8 character has no text of its own;
completions, which have no ``bytes`` field, label it ``bytes:\\xNN``, so that two fragments stay distinct.
"""

import codecs
from collections.abc import Sequence
from typing import Any, Final

from paceline.server.engine.interface import Tokenizer
from paceline.server.engine.request import TokenLogprob

#: JSON has no -Infinity; the value stands for a probability of zero.
LOWEST_LOGPROB: Final = -9999.0


class TextOffsets:
    """Where each token starts in its choice's text, in characters.

    Tokens are fed in order; a character that spans several tokens starts at the first of them. Special tokens
    add no text, unless an echoed prompt spells them out.

    Args:
        beginning: the text that the choice's first event brings; shows what the tokenizer left out of it.
    """

    def __init__(self, tokenizer: Tokenizer, beginning: str) -> None:
        self._tokenizer = tokenizer
        self._beginning = beginning
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = 0

    def next(self, token_id: int) -> int:
        """Offset of the next token."""
        offset = self._chars
        if not self._is_special(token_id) or self._is_spelled_out(token_id):
            text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
            self._chars += len(text) - self._lost_space(text)
        return offset

    def _is_special(self, token_id: int) -> bool:
        if token_id in self._tokenizer.eos_ids:
            return True
        # A sentencepiece space is decoded to nothing at the start of a text, but isn't special.
        return not self._tokenizer.decode([token_id]) and bool(self._tokenizer.token_bytes(token_id).strip())

    def _is_spelled_out(self, token_id: int) -> bool:
        text = self._tokenizer.token_text(token_id)
        return bool(text) and self._beginning.startswith(text, self._chars)

    def _lost_space(self, text: str) -> int:
        """1 for the space that sentencepiece tokenizers put before a text and take away again."""
        at_start = self._chars == 0 and text.startswith(" ")
        return int(at_start and bool(self._beginning) and not self._beginning.startswith(" "))


def completion_logprobs(
    entries: Sequence[TokenLogprob], tokenizer: Tokenizer, offsets: TextOffsets
) -> dict[str, Any]:
    """``{tokens, token_logprobs, top_logprobs, text_offset}``, one entry per token.

    ``top_logprobs`` holds the chosen token besides the most likely ones. A prompt's first token has nulls.
    """
    return {
        "tokens": [_label(tokenizer, entry.token_id) for entry in entries],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top_by_label(entry, tokenizer) for entry in entries],
        "text_offset": [offsets.next(entry.token_id) for entry in entries],
    }


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """``{content: [{token, logprob, bytes, top_logprobs}]}``, one entry per token."""
    return {
        "content": [
            {
                **_chat_entry(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [_chat_entry(tokenizer, token_id, value) for token_id, value in entry.top],
            }
            for entry in entries
        ]
    }


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _top_by_label(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float | None] | None:
    if entry.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(_label(tokenizer, token_id), _finite(logprob))
    return top


def _label(tokenizer: Tokenizer, token_id: int) -> str:
    raw = tokenizer.token_bytes(token_id)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return tokenizer.token_text(token_id)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)
