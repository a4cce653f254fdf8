"""Prompt lookup: drafting by copying what followed an earlier occurrence of the last few tokens.

Owns the n-gram index of one sequence. Plain Python, no tensors, no model: token ids in, token ids out. The
proposals are deterministic, so their q is one-hot (``DraftBlock.probs`` is None). Only committed tokens are
added; nothing is ever taken back. The idea is that of prompt lookup decoding (Saxena, 2023).
"""

from collections.abc import Sequence

DEFAULT_MAX_N = 4
DEFAULT_MIN_N = 2


class NgramIndex:
    """The n-grams of one growing sequence, each with its latest occurrence that a token follows.

    Args:
        max_n: longest n-gram looked up, tried first.
        min_n: shortest; one-token matches propose much and are rarely right, so the default is 2.
    """

    def __init__(self, max_n: int = DEFAULT_MAX_N, min_n: int = DEFAULT_MIN_N) -> None:
        assert 1 <= min_n <= max_n, f"need 1 <= min_n <= max_n, got {min_n} and {max_n}"
        self._sizes = range(max_n, min_n - 1, -1)
        self._tokens: list[int] = []
        #: n-gram -> index of the token after its latest occurrence. The n-grams that end the sequence are not
        #: in it until a token follows them, so a suffix never finds itself.
        self._followers: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens; costs O(len(tokens))."""
        for token in tokens:
            for key in self._suffixes():
                self._followers[key] = len(self._tokens)
            self._tokens.append(token)

    @property
    def match_length(self) -> int:
        """Length of the longest known suffix, the one a proposal continues; 0 if there is none."""
        return next((len(key) for key in self._suffixes() if key in self._followers), 0)

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """Continue the sequence as its longest known suffix was continued last time.

        If the earlier occurrence is so near that the copy reaches the end of the sequence, it goes on through
        its own tokens: a loop is continued as a loop.

        Returns:
            ``max_tokens`` tokens, or none if no suffix occurred before.
        """
        for key in self._suffixes() if max_tokens > 0 else ():
            start = self._followers.get(key)
            if start is not None:
                period = self._tokens[start : start + max_tokens]
                repeats = -(-max_tokens // len(period))
                return tuple((period * repeats)[:max_tokens])
        return ()

    def _suffixes(self) -> list[tuple[int, ...]]:
        """The n-grams that end the sequence, longest first."""
        return [tuple(self._tokens[-n:]) for n in self._sizes if n <= len(self._tokens)]


class NgramProposer:
    """Prompt lookup with one setting for many sequences.

    Args:
        max_n: longest n-gram looked up.
        min_n: shortest n-gram looked up.
    """

    def __init__(self, max_n: int = DEFAULT_MAX_N, min_n: int = DEFAULT_MIN_N) -> None:
        self.max_n = max_n
        self.min_n = min_n

    def index(self, tokens: Sequence[int] = ()) -> NgramIndex:
        """A new index holding ``tokens``; keep one per sequence and extend it by what each step commits."""
        index = NgramIndex(self.max_n, self.min_n)
        index.extend(tokens)
        return index

    def propose(self, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """The proposal for a sequence seen once; costs O(len(tokens)), so growing sequences keep an index."""
        return self.index(tokens).propose(max_tokens)
