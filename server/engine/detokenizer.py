"""From committed token ids to text that may be sent: whole characters only, no part of a stop string.

Pure Python over the ``Tokenizer`` interface; knows no sequences and no HTTP. Both classes give the same
result however the input is cut into pushes, which makes a speculated text equal to one made token by token.
"""

import codecs
from collections.abc import Sequence

from paceline.server.engine.interface import Tokenizer


class IncrementalDetokenizer:
    """Text of a growing list of ids; all pushes and the flush together equal ``decode`` of all ids.

    Args:
        tokenizer: of the ids' model.
        skip_special_tokens: leave control tokens out of the text.
        continues: the ids go on after other text (a completion of a prompt), so that a tokenizer which drops
            the first space of a text must keep it here.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._at_start = not continues
        self._special: dict[int, bool] = {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text that these ids complete; bytes of an unfinished character are held back."""
        return self._utf8.decode(b"".join(map(self._bytes_of, ids)))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the detokenizer is at its end."""
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        if self._skip_special_tokens and self._is_special(token_id):
            return b""
        added = self._tokenizer.token_bytes(token_id)
        if self._at_start and added:
            self._at_start = False
            alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
            if added.startswith(b" ") and alone == added[1:].decode("utf-8", errors="replace"):
                return added[1:]
        return added

    def _is_special(self, token_id: int) -> bool:
        """Whether plain decoding leaves the token out although it has text of its own."""
        known = self._special.get(token_id)
        if known is None:
            decode = self._tokenizer.decode
            known = not decode([token_id]) and bool(decode([token_id], skip_special_tokens=False))
            self._special[token_id] = known
        return known


class StopChecker:
    """Watches text for stop strings.

    The match that ends first wins, and among those ending together the longest; that choice depends on the
    text only, not on how it was cut into pushes.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.hit: str | None = None  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; returns the text that is now final, and whether a stop string was found.

        A suffix that could still become a stop string is held back. The stop string itself and whatever
        follows it are dropped, now and on later pushes.
        """
        if self.hit is not None:
            return "", True
        if not self._matchers:
            return text, False
        for index, char in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(char)]
            if complete:
                self.hit = max(complete, key=len)
                before = self._held + text[: index + 1]
                self._held = ""
                return before[: len(before) - len(self.hit)], True
        return self._release(text), False

    def flush(self) -> str:
        """The text still held back: the end came before the stop string did."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        pending = self._held + text
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


class _Matcher:
    """Knuth-Morris-Pratt search for one string, a character at a time.

    The failure table grows only as far as the text has matched, so that a stop string of a megabyte costs
    nothing until the text begins to look like it.

    Attributes:
        matched: length of the longest prefix of ``stop`` that the text so far ends with.
    """

    def __init__(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string must not be empty")
        self.stop = stop
        self.matched = 0
        self._failure = [0, 0]  # per prefix length: longest proper prefix of it that is also its suffix

    def advance(self, char: str) -> bool:
        """Take one character; True when the whole string has just been seen."""
        matched = self.matched
        while matched and self.stop[matched] != char:
            matched = self._failure[matched]
        if self.stop[matched] == char:
            matched += 1
        self.matched = matched
        if len(self._failure) == matched:
            self._grow()
        return matched == len(self.stop)

    def _grow(self) -> None:
        length = len(self._failure)
        last = self.stop[length - 1]
        candidate = self._failure[length - 1]
        while candidate and self.stop[candidate] != last:
            candidate = self._failure[candidate]
        self._failure.append(candidate + 1 if self.stop[candidate] == last else 0)
