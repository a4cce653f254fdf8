"""Tokenizers of the real models: reference ids, transformers' ids, and exact incremental text."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_models import QWEN_CODER, SMOLLM2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from paceline.server.engine.detokenizer import IncrementalDetokenizer
from paceline.server.models.gguf_tokenizer import converted_folder
from paceline.server.models.tokenizer import HfTokenizer, load_tokenizer

pytestmark = pytest.mark.real

REFERENCE = {
    SMOLLM2: [19556, 28, 905, 17, 753, 275, 24, 104, 727],
    QWEN_CODER: [9707, 11, 1879, 0, 707, 282, 2075, 1648],
}
EOS = {SMOLLM2: {2}, QWEN_CODER: {151645}}
TEXTS = [
    "Hello, world! def f(x):",
    "日本語のテキストと中文，以及 한국어",
    "👩‍👩‍👧‍👦 and 🎉🎉, naïve café — “quoted”…",
    "def f(n):\n    return [i for i in range(n) if i % 2]\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "tabs\tand   spaces   \n\n\n",
]

_loaded: dict[str, HfTokenizer] = {}


@pytest.fixture(params=[SMOLLM2, QWEN_CODER])
def name(request: pytest.FixtureRequest, real_model: Callable[[str], Path]) -> str:
    model = str(request.param)
    if model not in _loaded:
        _loaded[model] = load_tokenizer(real_model(model))
    return model


def test_reference_ids(name: str) -> None:
    tokenizer = _loaded[name]

    assert tokenizer.encode("Hello, world! def f(x):") == REFERENCE[name]
    assert tokenizer.eos_ids == EOS[name]


def test_ids_and_text_equal_those_of_transformers(name: str, real_model: Callable[[str], Path]) -> None:
    path = real_model(name)
    theirs = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = _loaded[name].encode(text)
        assert ids == theirs.encode(text)
        assert _loaded[name].decode(ids, skip_special_tokens=False) == text
        assert _loaded[name].decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    assert _loaded[name].apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_other_loaders_read_the_converted_folder_alike(name: str, real_model: Callable[[str], Path]) -> None:
    folder = converted_folder(real_model(name))
    theirs = AutoTokenizer.from_pretrained(folder)

    for text in [*TEXTS, "1234 + 5\n\n1. first"]:
        assert theirs.encode(text) == _loaded[name].encode(text)
    assert load_tokenizer(folder).sha256 == _loaded[name].sha256


def test_smollm2_splits_digits_as_its_published_tokenizer(real_model: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(real_model(SMOLLM2))
    pieces = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("a\n\n12  34")]

    assert pieces == ["a", "\n\n", "1", "2", "  ", "3", "4"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_pushed_anyhow_make_the_text_of_decode(name: str, data: st.DataObject) -> None:
    tokenizer = _loaded[name]
    text_ids = st.text(max_size=20).map(tokenizer.encode)
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)
    ids = data.draw(st.lists(st.one_of(text_ids, any_ids), max_size=3).map(lambda lists: list(chain(*lists))))
    chunk = data.draw(st.integers(1, 5))

    detokenizer = IncrementalDetokenizer(tokenizer)
    pushed = [detokenizer.push(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]

    assert "".join(pushed) + detokenizer.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)
