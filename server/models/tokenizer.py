"""Text to token ids and back, for one model, from any thread.

Owns ``HfTokenizer`` (the ``Tokenizer`` of ``engine.interface``) and how it is loaded. Encoding and chat
templates are those of `tokenizers` and `transformers`; decoding joins the tokens' exact bytes, so that text,
token bytes and incremental detokenizing can never disagree.
"""

import copy
import filecmp
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError, InvalidRequestError
from paceline.server.models.config import unsupported

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(path: Path) -> "HfTokenizer":
    """The tokenizer of a Hugging Face folder or a ``.gguf`` file.

    Raises:
        ArtifactError: there is none, or it cannot be read.
        UnsupportedModelError: it is neither byte-level BPE nor sentencepiece BPE.
    """
    folder = tokenizer_folder(path)
    return _load_folder(path) if folder == path else _load_converted(folder)


def tokenizer_folder(path: Path) -> Path:
    """Where a model's tokenizer files are: the folder itself, or what a ``.gguf`` file's tokenizer was converted to."""
    if path.suffix == ".gguf" and path.is_file():
        from paceline.server.models.gguf_tokenizer import converted_folder

        return converted_folder(path)
    return path


def same_tokenizer_files(path: Path, other: Path) -> bool:
    """Whether two models hold copies of one tokenizer, which spares loading it a second time."""
    names = ("tokenizer.json", "tokenizer_config.json")
    pairs = [(tokenizer_folder(path) / name, tokenizer_folder(other) / name) for name in names]
    return all(a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False) for a, b in pairs)


def _load_folder(folder: Path) -> "HfTokenizer":
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise ArtifactError(f"{folder} has no tokenizer.json (or tokenizer.model)")
    try:
        hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = hf.backend_tokenizer
    except Exception as error:  # transformers raises a dozen kinds for damaged files
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    own = () if hf.eos_token_id is None else (int(hf.eos_token_id),)
    return HfTokenizer(backend, hf, _configured_eos(folder) | frozenset(own))


def _load_converted(folder: Path) -> "HfTokenizer":
    """A folder that we wrote, without transformers' second pass over it: 0.8 s for 150,000 entries."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    renderer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.BPE()),
        chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        **{name: value for name, value in config.items() if name.endswith("_token")},
    )
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    return HfTokenizer(backend, renderer, _configured_eos(folder))


def _configured_eos(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of ``generation_config.json``, or else of ``config.json``."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


class HfTokenizer:
    """A byte-level or sentencepiece BPE tokenizer; see ``engine.interface.Tokenizer``.

    Attributes:
        vocab_size: highest token id plus one.
        eos_ids: ids that end a generation.
        sha256: hash of the vocabulary, that is of all (id, piece) pairs; two tokenizers with the same hash
            give every id the same text, whatever files they came from.
        special_ids: ids of control tokens, which plain decoding leaves out.
    """

    def __init__(
        self, backend: "Backend", renderer: "PreTrainedTokenizerBase", eos_ids: frozenset[int]
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._renderer: Any = renderer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._pieces = _Pieces(backend, {token_id: token.content for token_id, token in added.items()})
        self._bytes: dict[int, bytes] = {}  # filled as ids occur
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_ids = eos_ids
        self.sha256 = vocabulary_sha256(vocabulary)
        self.has_chat_template = renderer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See ``Tokenizer.encode``.

        Raises:
            InvalidRequestError: half a surrogate pair, which JSON can carry and UTF-8 cannot.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise InvalidRequestError(
                "text holds half a surrogate pair, which is not valid Unicode"
            ) from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See ``Tokenizer.decode``."""
        kept = (token_id for token_id in ids if not (skip_special_tokens and token_id in self.special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return text[1:] if self._pieces.strips_first_space and text.startswith(" ") else text

    def token_text(self, token_id: int) -> str:
        """See ``Tokenizer.token_text``."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See ``Tokenizer.token_bytes``; empty for an id that the vocabulary does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._pieces.bytes_of(token_id)
        return known

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """See ``Tokenizer.apply_chat_template``."""
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions", param="messages"
            )
        try:
            text = self._renderer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return self.encode(text, add_special_tokens=False)
        except Exception as error:  # a template is a program: what it raises is its answer to these messages
            reason = " ".join(str(error).split())
            raise InvalidRequestError(
                f"the chat template refuses the messages: {reason}", param="messages"
            ) from error

    def with_template(self, template: str) -> "HfTokenizer":
        """The same tokenizer with another chat template (Jinja)."""
        other = copy.copy(self)
        other._renderer = copy.copy(self._renderer)
        other._renderer.chat_template = template
        other.has_chat_template = True
        return other


class _Pieces:
    """Which bytes a vocabulary entry stands for."""

    def __init__(self, backend: "Backend", added: Mapping[int, str]) -> None:
        self._backend = backend
        self._added = added
        decoder = backend.decoder
        steps = _decoder_steps(json.loads(decoder.__getstate__())) if decoder is not None else []
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise unsupported(f"a tokenizer that decodes with {sorted(kinds) or 'nothing'}")
        self.strips_first_space = any(_strips_first_space(step) for step in steps)
        self._byte_of = _byte_alphabet()

    def bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        # id_to_token takes unsigned 32-bit numbers only.
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if piece is None:
            return b""
        if self._byte_level:
            mapped = [self._byte_of.get(char) for char in piece]
            # An entry outside the byte alphabet (GGUF keeps such) stands for itself, as in `tokenizers`.
            return piece.encode() if None in mapped else bytes(byte for byte in mapped if byte is not None)
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


def _decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]


def _strips_first_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["start"] >= 1)
    return bool(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, reversed.

    Bytes that are printable in Latin-1 stand for themselves; the others take the code points from 256 on, in
    order (the GPT-2 convention).
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def vocabulary_sha256(vocabulary: Mapping[str, int]) -> str:
    """Hash of all (id, piece) pairs, without the ``[PADn]`` that GGUF files fill up to the embedding's rows.

    Merges are not part of it: they decide how text is cut, not what an id means, and a GGUF file and the
    folder it was made from may list them in different orders.
    """
    entries = sorted((token_id, piece) for piece, token_id in vocabulary.items())
    lines = [
        f"{token_id}:{len(piece)}:{piece}\n" for token_id, piece in entries if piece != f"[PAD{token_id}]"
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
