from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.server.decoding.ngram import NgramIndex, NgramProposer


def reference(tokens: Sequence[int], max_tokens: int, max_n: int, min_n: int) -> tuple[int, ...]:
    """Look for the longest suffix from the end backwards, and continue token by token."""
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tuple(tokens[end - n : end]) == tuple(tokens[len(tokens) - n :]):
                longer = list(tokens)
                for at in range(max_tokens):
                    longer.append(longer[end + at])
                return tuple(longer[len(tokens) :])
    return ()


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=6),
    max_tokens=st.integers(0, 8),
    sizes=st.sampled_from([(4, 2), (3, 1), (2, 2), (1, 1)]),
)
def test_index_equals_a_backward_search_at_every_length(
    pieces: list[list[int]], max_tokens: int, sizes: tuple[int, int]
) -> None:
    index = NgramIndex(*sizes)
    proposer = NgramProposer(*sizes)
    tokens: list[int] = []
    for piece in pieces:
        index.extend(piece)
        tokens += piece
        expected = reference(tokens, max_tokens, *sizes)
        assert index.propose(max_tokens) == expected
        assert index.propose(max_tokens) == expected, "a proposal changes nothing"
        assert proposer.propose(tokens, max_tokens) == expected
        assert proposer.index(tokens).propose(max_tokens) == expected
    assert len(index) == len(tokens)


def test_longest_suffix_wins_then_the_latest_occurrence() -> None:
    proposer = NgramProposer(max_n=3, min_n=1)
    assert proposer.propose([1, 2, 3, 9, 0, 3, 8, 1, 2, 3], 2) == (9, 0)
    assert proposer.propose([7, 1, 5, 7, 2, 5, 7], 1) == (2,)
    assert NgramProposer().propose([7, 1, 5, 7], 1) == ()  # one token is too little by default


def test_a_loop_is_continued_as_a_loop() -> None:
    assert NgramProposer().propose([5, 1, 2, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)
    assert NgramProposer().propose([5, 8, 8, 8], 4) == (8, 8, 8, 8)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_known_proposes_nothing(tokens: list[int]) -> None:
    assert NgramProposer().propose(tokens, 4) == ()


class _Counting(list[int]):
    """A list that counts how many elements are read from it."""

    reads = 0

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.reads += len(value) if isinstance(key, slice) else 1
        return value


def test_a_step_reads_no_more_of_a_long_sequence_than_of_a_short_one() -> None:
    reads = []
    for length in (100, 8000):
        index = NgramIndex()
        index.extend([i * i % 97 for i in range(length)])
        counting = _Counting(index._tokens)
        index._tokens = counting
        index.extend([1, 4, 9])
        index.propose(5)
        reads.append(counting.reads)
    assert reads[0] == reads[1] <= 60
