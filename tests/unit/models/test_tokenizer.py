"""Loading, encoding, exact token bytes and chat templates, with tiny tokenizers."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from paceline.server.errors import ArtifactError, InvalidRequestError, UnsupportedModelError
from paceline.server.models.gguf_tokenizer import converted_folder
from paceline.server.models.tokenizer import load_tokenizer, vocabulary_sha256

TEXTS = [
    "Hello, world!",
    "the onion\n\n1. x  12",
    "naïve 日本語 👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " lead",
]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that the test may change."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(folder: Path, text: str) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)

    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_facts_about_the_vocabulary(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)

    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_ids == {tiny.EOS_ID}
    assert {2, 3} <= tokenizer.special_ids
    assert tokenizer.has_chat_template


def test_every_byte_is_one_token_with_exactly_that_byte(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    single = sorted(tokenizer.token_bytes(token_id) for token_id in range(4, 260))

    assert single == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(2) == b"<|im_start|>"
    assert tokenizer.token_text(2) == "<|im_start|>"
    assert tokenizer.token_bytes(300) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_text(tokenizer.encode("é")[0]) == "\ufffd"


def test_all_configured_ends_of_sequence_count(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_tokenizer(folder).eos_ids == {1, 7, tiny.EOS_ID}

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_tokenizer(folder).eos_ids == {9, tiny.EOS_ID}


def test_the_hash_is_that_of_the_vocabulary(folder: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    assert load_tokenizer(folder).sha256 == load_tokenizer(tiny_checkpoint("mistral")).sha256
    assert load_tokenizer(folder).sha256 != load_tokenizer(tiny_checkpoint("llama", vocab_size=310)).sha256

    assert vocabulary_sha256({"a": 0, "b": 1}) == vocabulary_sha256({"b": 1, "a": 0, "[PAD2]": 2})
    assert vocabulary_sha256({"a": 0, "b": 1}) != vocabulary_sha256({"b": 0, "a": 1})
    assert vocabulary_sha256({"a": 0}) != vocabulary_sha256({"a": 0, "[PAD2]": 1})


def test_chat_prompts_equal_those_of_transformers(folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        ids = load_tokenizer(folder).apply_chat_template(messages, add_generation_prompt=prompt)
        assert ids == theirs.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "chat template"),
        ("{{ messages[5].role }}", "chat template"),
        ("{% if %}", "chat template"),
    ],
)
def test_a_template_that_fails_refuses_the_messages(folder: Path, template: str, says: str) -> None:
    for file in folder.glob("chat_template*"):
        file.unlink()
    (folder / "chat_template.jinja").write_text(template)

    with pytest.raises(InvalidRequestError, match=says) as caught:
        load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_without_a_template_chat_is_refused(folder: Path) -> None:
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer = load_tokenizer(folder)

    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_half_a_surrogate_pair_is_the_clients_error(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InvalidRequestError):
        tokenizer.apply_chat_template([{"role": "user", "content": "a\ud800"}])


def test_many_threads_share_one_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "the onion"}]
    expected = [tokenizer.encode(text) for text in TEXTS], tokenizer.apply_chat_template(messages)

    def work(_: int) -> Any:
        return [tokenizer.encode(text) for text in TEXTS], tokenizer.apply_chat_template(messages)

    with ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(work, range(200)))


def test_truncation_and_padding_set_in_the_file_are_off(folder: Path) -> None:
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(file))

    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("a longer text")) == "a longer text"


def test_missing_damaged_and_foreign_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)

    wordpiece = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=wordpiece).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(tmp_path / "bert")

    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_tokenizer(folder)


def write_gguf_tokenizer(path: Path, pre: str = "default", **extra: Any) -> Path:
    """The tiny tokenizer as a GGUF file (no tensors)."""
    state = json.loads(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tiny.SPECIALS else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_cache")
def test_a_gguf_tokenizer_equals_the_folder_it_came_from(folder: Path, tmp_path: Path) -> None:
    ours, original = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf")), load_tokenizer(folder)
    messages = [{"role": "user", "content": "the onion"}]

    assert ours.vocab_size == original.vocab_size == 300  # no <|endoftext|> of transformers' own
    assert ours.sha256 == original.sha256
    assert ours.eos_ids == original.eos_ids
    assert [ours.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert ours.apply_chat_template(messages) == original.apply_chat_template(messages)


@pytest.mark.usefixtures("_cache")
def test_conversion_happens_once_and_again_when_the_file_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write_gguf_tokenizer(tmp_path / "m.gguf")
    first = converted_folder(path)
    assert "converting" in caplog.text
    caplog.clear()

    assert converted_folder(path) == first
    assert "converting" not in caplog.text

    write_gguf_tokenizer(path, pre="smollm")
    assert converted_folder(path) != first
    assert not list(first.parent.glob(".converting*"))


@pytest.mark.usefixtures("_cache")
def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf_tokenizer(tmp_path / "m.gguf", add_token_scores=[0.0])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes().replace(b"Helloworld", b"").replace(b"gpt2", b"bert"))
    with pytest.raises(UnsupportedModelError, match="tokenizer 'bert'"):
        load_tokenizer(broken)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


@pytest.mark.usefixtures("_cache")
def test_digits_stand_alone_where_the_vocabulary_was_learned_so(tmp_path: Path) -> None:
    plain = load_tokenizer(write_gguf_tokenizer(tmp_path / "a.gguf"))
    digits = load_tokenizer(write_gguf_tokenizer(tmp_path / "b.gguf", pre="smollm"))

    # The oracle is the pre-tokenizer of SmolLM2's published tokenizer.json.
    published = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    split = json.loads(published.__getstate__())
    found = json.loads((converted_folder(tmp_path / "b.gguf") / "tokenizer.json").read_text())[
        "pre_tokenizer"
    ]
    assert found == split
    assert plain.decode(plain.encode("a\n\n12")) == digits.decode(digits.encode("a\n\n12")) == "a\n\n12"


@pytest.mark.usefixtures("_cache")
def test_text_is_normalised_where_the_original_tokenizer_does_so(tmp_path: Path) -> None:
    plain = load_tokenizer(write_gguf_tokenizer(tmp_path / "a.gguf"))
    qwen = load_tokenizer(write_gguf_tokenizer(tmp_path / "b.gguf", pre="qwen2"))
    decomposed = "cafe\u0301"

    assert plain.decode(plain.encode(decomposed)) == decomposed
    assert qwen.decode(qwen.encode(decomposed)) == "caf\u00e9"


@pytest.mark.usefixtures("_cache")
def test_a_beginning_of_sequence_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    without = load_tokenizer(write_gguf_tokenizer(tmp_path / "a.gguf"))
    with_bos = load_tokenizer(write_gguf_tokenizer(tmp_path / "b.gguf", add_add_bos_token=True))
    by_default = load_tokenizer(write_gguf_tokenizer(tmp_path / "c.gguf", pre="llama-bpe"))

    ids = without.encode("the")
    assert ids[0] != 0
    assert with_bos.encode("the") == by_default.encode("the") == [0, *ids]
    assert with_bos.encode("the", add_special_tokens=False) == ids
    assert with_bos.apply_chat_template([{"role": "user", "content": "x"}])[0] == 2


@pytest.mark.usefixtures("_cache")
def test_an_unknown_pre_tokenizer_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(write_gguf_tokenizer(tmp_path / "a.gguf", pre="martian"))
    assert "'martian' is not known" in caplog.text


def write_sentencepiece_gguf(path: Path, **extra: Any) -> Path:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 259 + [-10.0, -10.0, -10.0, -2.0, -1.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("_cache")
def test_a_sentencepiece_vocabulary_from_gguf(tmp_path: Path) -> None:
    usual = load_tokenizer(write_sentencepiece_gguf(tmp_path / "a.gguf"))
    no_prefix = load_tokenizer(write_sentencepiece_gguf(tmp_path / "b.gguf", add_add_space_prefix=False))
    bos, a, b, space_a, ab = 1, 260, 261, 262, 263

    assert usual.encode("a ab") == [bos, space_a, 259, ab]  # a space of its own, and the better merge
    assert usual.decode([bos, space_a, 259, ab]) == "a ab"
    assert no_prefix.encode("a b") == [bos, a, 259, b]
    assert no_prefix.decode([space_a]) == " a"
    emoji = usual.encode("🎉", add_special_tokens=False)
    assert [usual.token_bytes(token_id) for token_id in emoji] == [
        b" ",
        *(bytes([byte]) for byte in "🎉".encode()),
    ]
    assert not usual.has_chat_template
