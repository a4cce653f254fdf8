"""Detokenizing and stop strings, over every way to cut the input."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paceline.server.engine.detokenizer import IncrementalDetokenizer, StopChecker
from paceline.server.models.tokenizer import HfTokenizer


def byte_level() -> HfTokenizer:
    hf = tiny.tiny_tokenizer()
    return HfTokenizer(hf.backend_tokenizer, hf, frozenset({tiny.EOS_ID}))


def byte_fallback() -> HfTokenizer:
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "a",
        "b",
        "é",
        "▁▁",
    ]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{{ x }}",
    )
    return HfTokenizer(hf.backend_tokenizer, hf, frozenset({2}))


Items = TypeVar("Items", list[int], str)

TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def cut(items: Items, points: list[int]) -> list[Items]:
    edges = [0, *sorted(point % (len(items) + 1) for point in points), len(items)]
    return [items[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data(), points=st.lists(st.integers(0, 1000), max_size=20))
def test_any_ids_cut_anyhow_make_the_text_of_decode(
    kind: str, skip: bool, data: st.DataObject, points: list[int]
) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40))

    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    text = "".join(detokenizer.push(part) for part in cut(ids, points)) + detokenizer.flush()

    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
# A sentencepiece vocabulary cannot tell a first space from the one it adds, nor its space mark from a space.
@given(text=st.text(max_size=30).filter(lambda text: not text.startswith(" ") and "▁" not in text))
def test_text_survives_encoding_and_detokenizing_one_by_one(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)

    assert "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush() == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["naïve café", "日本語テキスト", "👩‍👩‍👧 family 🎉", "a \U0010ffff b"])
def test_no_push_ends_within_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    detokenizer = IncrementalDetokenizer(tokenizer)

    pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False)]

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_an_unfinished_character_comes_out_at_the_end_as_a_replacement() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("ok 🎉")[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)

    assert detokenizer.push(ids) == "ok "
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_left_out_or_kept_as_asked() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")

    assert IncrementalDetokenizer(tokenizer).push(ids) == "hi"
    assert IncrementalDetokenizer(tokenizer, False).push(ids) == "<|im_start|>hi<|im_end|>"


def test_a_completion_keeps_its_first_space() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    word = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.token_bytes(word[0]) == b" a"

    assert IncrementalDetokenizer(tokenizer).push(word) == "a"
    assert IncrementalDetokenizer(tokenizer, continues=True).push(word) == " a"


def run_stops(stops: tuple[str, ...], pieces: Sequence[str]) -> tuple[str, bool]:
    checker = StopChecker(stops)
    out, hit = "", False
    for piece in pieces:
        text, hit = checker.push(piece)
        out += text
        assert not any(stop in out for stop in stops)
    return out + checker.flush(), hit


def expected_stops(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """Straight from the definition: the first prefix of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@settings(max_examples=400)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4).map(tuple),
    text=st.text("abc", max_size=40),
    points=st.lists(st.integers(0, 1000), max_size=12),
)
def test_stops_do_not_hang_on_how_the_text_is_cut(
    stops: tuple[str, ...], text: str, points: list[int]
) -> None:
    assert run_stops(stops, cut(text, points)) == expected_stops(stops, text)


def test_every_short_stop_is_found_in_every_short_text() -> None:
    """Exhaustive: overlapping beginnings (``aab`` in ``aaab``) are too rare among random strings."""
    words = ["".join(letters) for length in range(1, 6) for letters in itertools.product("ab", repeat=length)]
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=9)]
    for stop in words:
        for text in texts:
            assert run_stops((stop,), [text]) == expected_stops((stop,), text)


def test_only_what_could_become_a_stop_is_held_back() -> None:
    checker = StopChecker(("\n\n", "END"))

    assert checker.push("a line\n") == ("a line", False)
    assert checker.push("ENTER") == ("\nENTER", False)
    assert checker.push(" E") == (" ", False)
    assert checker.push("N") == ("", False)
    assert checker.push("D and more") == ("", True)
    assert checker.hit == "END"
    assert checker.push("later") == ("", True)
    assert checker.flush() == ""


def test_without_stops_everything_passes() -> None:
    assert StopChecker(()).push("text") == ("text", False)


def test_an_empty_stop_is_our_bug() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(("",))


def test_a_huge_stop_costs_no_more_than_the_text_that_resembles_it() -> None:
    stop = "ab" * 500_000 + "c"
    checker = StopChecker((stop, "a" * 1_000_000, "b" * 1_000_000, stop[1:]))
    for _ in range(20_000):  # quadratic work would take minutes here
        assert checker.push("abab") == ("", False)

    assert checker.flush() == "abab" * 20_000
    # What was prepared of the stop string is what the text has resembled, not its megabyte.
    assert len(checker._matchers[0]._failure) <= 80_000 + 2
