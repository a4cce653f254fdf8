"""Offsets where the tokenizer is of the sentencepiece kind, whose texts begin with a space that isn't there."""

from fake_engine import ByteTokenizer

from paceline.server.api.logprobs import TextOffsets


class SpaceStripping(ByteTokenizer):
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        text = super().decode(ids, skip_special_tokens=skip_special_tokens)  # type: ignore[arg-type]
        return text.removeprefix(" ")


def offsets(beginning: str, ids: list[int]) -> list[int]:
    track = TextOffsets(SpaceStripping(), beginning)
    return [track.next(token_id) for token_id in ids]


def test_the_space_before_a_text_does_not_count() -> None:
    assert offsets("a b", [256, *b" a b"]) == [0, 0, 0, 1, 2]


def test_a_space_that_is_there_counts() -> None:
    assert offsets(" a", list(b" a")) == [0, 1]


def test_an_empty_beginning_tells_nothing() -> None:
    assert offsets("", list(b" a")) == [0, 1]
