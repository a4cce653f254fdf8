"""The tokenizer inside a GGUF file, converted once into a Hugging Face tokenizer folder and cached.

transformers does the conversion; this module adds what it leaves out (the beginning-of-sequence rule, how
digits and spaces are split, Unicode normalisation), so that text becomes the ids of the model's original
tokenizer. The folders live in the cache folder under a key of the file's size, time and first bytes, and of
the converter's version.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paceline.server.errors import ArtifactError
from paceline.server.models.config import unsupported
from paceline.server.models.gguf import open_reader
from paceline.server.models.gguf_config import Metadata, special_ids
from paceline.server.models.sources import cache_dir

logger = logging.getLogger(__name__)

#: Part of the cache key: raise it when the conversion changes.
_CONVERTER = 1
_HEAD_BYTES = 1 << 16
#: ``tokenizer.ggml.pre`` of vocabularies learned digit by digit; transformers splits them as GPT-2 does.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
#: ...whose original tokenizer normalises text to NFC first.
_NFC = {"qwen2", "deepseek-r1-qwen"}
#: ...that start every text with the beginning-of-sequence token unless the file says otherwise.
_BOS_BY_DEFAULT = {"llama3", "llama-v3", "llama-bpe", "tekken"}
_GPT2 = {None, "default", "gpt-2"}


def converted_folder(path: Path, cache: Path | None = None) -> Path:
    """Folder with the Hugging Face tokenizer of a ``.gguf`` file, converted first if it must be.

    Raises:
        ArtifactError: the file holds no usable tokenizer.
        UnsupportedModelError: its tokenizer is of a kind that the native engine does not run.
    """
    parent = cache_dir(cache) / "tokenizers"
    folder = parent / f"{path.stem}-{_key(path)}"
    if folder.is_dir():
        return folder
    logger.info("converting the tokenizer of %s (once)", path.name)
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".converting-"))
    try:
        _convert(path, temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker, with the same result
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _key(path: Path) -> str:
    stat = path.stat()
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    facts = (
        f"{stat.st_size} {stat.st_mtime_ns} {_CONVERTER} {version('transformers')} {version('tokenizers')}"
    )
    return hashlib.sha256(facts.encode() + head).hexdigest()[:16]


def _convert(path: Path, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    metadata = Metadata(open_reader(path), path)
    kind = metadata.general("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise unsupported(f"tokenizer {kind!r} ({path.name})")
    with tempfile.TemporaryDirectory() as alone:
        # transformers would also read tokenizer files that happen to lie beside the GGUF file.
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        try:
            hf = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf")
        except Exception as error:  # whatever the converter meets in a damaged vocabulary
            raise ArtifactError(f"the tokenizer in {path} cannot be converted: {error}") from error
    _complete(hf.backend_tokenizer, metadata, hf.bos_token)
    hf.save_pretrained(str(folder))
    _drop_tokens_from(folder / "tokenizer.json", metadata.length("tokenizer.ggml.tokens"))
    _write_configs(hf, metadata, folder)


def _drop_tokens_from(file: Path, first_id: int) -> None:
    """Remove added tokens past the file's vocabulary.

    transformers gives every byte-level vocabulary an ``<|endoftext|>``; where the model has none, it would get an
    id that the model has no embedding for.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    known = [token for token in state["added_tokens"] if token["id"] < first_id]
    if len(known) < len(state["added_tokens"]):
        state["added_tokens"] = known
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _complete(backend: Any, metadata: Metadata, bos_token: str | None) -> None:
    """Set what the GGUF metadata says and the conversion leaves out."""
    from tokenizers import normalizers, pre_tokenizers

    pre = metadata.general("tokenizer.ggml.pre")
    sentencepiece = metadata.general("tokenizer.ggml.model") == "llama"
    if sentencepiece and metadata.general("tokenizer.ggml.add_space_prefix") is False:
        _no_space_prefix(backend)
    if pre in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif not sentencepiece and pre not in _GPT2 and not _has_own_split(backend):
        logger.warning(
            "%s: pre-tokenizer %r is not known; text is split as GPT-2 does", metadata.path.name, pre
        )
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    add_bos = metadata.general("tokenizer.ggml.add_bos_token")
    if add_bos if add_bos is not None else sentencepiece or pre in _BOS_BY_DEFAULT:
        _start_with(backend, bos_token)


def _has_own_split(backend: Any) -> bool:
    """Whether transformers knew the pre-tokenizer and set its splitting pattern."""
    return b'"Split"' in backend.pre_tokenizer.__getstate__()


def _no_space_prefix(backend: Any) -> None:
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _start_with(backend: Any, token: str | None) -> None:
    from tokenizers import processors

    if token is None:
        raise ArtifactError("the GGUF file asks for a beginning-of-sequence token but names none")
    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", token, "$B:1"],
        special_tokens=[(token, backend.token_to_id(token))],
    )


def _write_configs(hf: Any, metadata: Metadata, folder: Path) -> None:
    """A configuration that every loader reads alike, and the end-of-sequence ids."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    config = {name: getattr(hf, name) for name in names if getattr(hf, name) is not None}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.need("context_length"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    ids = {key: value for key, value in special_ids(metadata).items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
