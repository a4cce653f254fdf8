"""``paceline.json``: what an artifact is, what it was made from and how good it was measured to be.

Owns reading, checking and writing the manifest. Keys that this version does not know are kept, at every
level, so that an older Paceline never damages a newer artifact. An artifact's name decides nothing about it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import read_json
from paceline.server.models.verified import write_text_atomic

MANIFEST = "paceline.json"
SCHEMA = 1
KINDS = ("draft", "student", "expert")
WEIGHT_FORMATS = ("fp32", "bf16", "int8", "int4", "bitmask", "n:m")


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an artifact was made from or for."""

    id: str
    tokenizer_sha256: str
    vocab_size: int
    weights_sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of ``paceline.json``.

    Attributes:
        weights: ``format`` and, where it applies, ``value_dtype``, ``n``, ``m``, ``group``.
        shared_with_target: names of tensors that the artifact takes from its target instead of storing them.
        draft_vocab: name of the tensor that lists the ids a draft can propose; None is all of them.
        measured: one mapping per dataset and setting.
        extra: top-level keys that this version does not know.
    """

    kind: str
    base: Base
    weights: Mapping[str, Any]
    shared_with_target: tuple[str, ...] = ()
    draft_vocab: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact, None for a folder that has none (a plain checkpoint).

    Raises:
        ArtifactError: unreadable, of another schema, or with a field that is missing or of the wrong type.
    """
    path = folder / MANIFEST
    return parse_manifest(read_json(path), str(path)) if path.exists() else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``paceline.json``; readers see the old one or the new one, never a part."""
    write_text_atomic(
        folder / MANIFEST, json.dumps(manifest_json(manifest), indent=2, ensure_ascii=False) + "\n"
    )


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON object that is written."""
    return {
        "schema": SCHEMA,
        "kind": manifest.kind,
        "base": {**_own_fields(manifest.base), **manifest.base.extra},
        "weights": dict(manifest.weights),
        "shared_with_target": list(manifest.shared_with_target),
        "draft_vocab": manifest.draft_vocab,
        "recipe": dict(manifest.recipe),
        "provenance": dict(manifest.provenance),
        "measured": [dict(figures) for figures in manifest.measured],
        **manifest.extra,
    }


def parse_manifest(raw: Mapping[str, Any], where: str) -> Manifest:
    """Check a manifest.

    Args:
        raw: the JSON object.
        where: what to call it in error messages.

    Raises:
        ArtifactError: one line saying which field is wrong and what it must be.
    """
    table = _Table(raw, where)
    schema = table.take("schema", int)
    if schema != SCHEMA:
        raise ArtifactError(f"{where}: schema {schema} is not {SCHEMA}; another version of Paceline wrote it")
    manifest = Manifest(
        kind=table.choice("kind", KINDS),
        base=_parse_base(_Table(table.take("base", dict), f"{where}: base")),
        weights=table.take("weights", dict),
        shared_with_target=tuple(table.texts("shared_with_target")),
        draft_vocab=table.take("draft_vocab", str, optional=True),
        recipe=table.take("recipe", dict, default={}),
        provenance=table.take("provenance", dict, default={}),
        measured=tuple(table.take("measured", list, default=[])),
        extra=table.rest(),
    )
    _Table(manifest.weights, f"{where}: weights").choice("format", WEIGHT_FORMATS)
    if not all(isinstance(figures, dict) for figures in manifest.measured):
        raise ArtifactError(f"{where}: measured must be a list of objects")
    return manifest


def check_tokenizer(target_sha256: str, other_sha256: str, *, who: str = "draft") -> None:
    """Refuse a draft, or who else works beside a target, whose token ids mean other text than the target's.

    Raises:
        ArtifactError: names both hashes.
    """
    if target_sha256 != other_sha256:
        raise ArtifactError(
            f"the {who}'s tokenizer (SHA-256 {other_sha256}) is not the target's ({target_sha256}): "
            f"the {who} must have the target's vocabulary"
        )


def check_base_weights(base: Base, sha256: str, *, artifact: Path, target: Path) -> None:
    """Refuse an artifact that takes tensors from another model than the one it was made for.

    Args:
        sha256: of the weights of ``target``.

    Raises:
        ArtifactError: names both hashes.
    """
    if sha256 != base.weights_sha256:
        raise ArtifactError(
            f"{artifact} takes tensors from {base.id} with weights of SHA-256 {base.weights_sha256}, "
            f"but {target} has {sha256}: name the target that it was made for"
        )


def _parse_base(table: "_Table") -> Base:
    return Base(
        id=table.take("id", str),
        tokenizer_sha256=table.take("tokenizer_sha256", str),
        vocab_size=table.take("vocab_size", int),
        weights_sha256=table.take("weights_sha256", str),
        extra=table.rest(),
    )


def _own_fields(base: Base) -> dict[str, Any]:
    names = [own.name for own in dataclasses.fields(base) if own.name != "extra"]
    return {name: getattr(base, name) for name in names}


class _Table:
    """Takes known keys out of a JSON object; what is left is kept as extra."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._left = dict(raw)
        self._where = where

    def take(self, key: str, kind: type, *, optional: bool = False, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if value is None and optional:
            return None
        # JSON's true would pass for a number.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            got = "missing" if value is None else f"{value!r}"
            raise ArtifactError(f"{self._where}: {key} must be {_WORDS[kind]}, but is {got}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value: str = self.take(key, str)
        if value not in choices:
            raise ArtifactError(f"{self._where}: {key} must be one of {', '.join(choices)}, but is {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        values: list[str] = self.take(key, list, default=[])
        if not all(isinstance(value, str) for value in values):
            raise ArtifactError(f"{self._where}: {key} must be a list of names")
        return values

    def rest(self) -> dict[str, Any]:
        return self._left


_WORDS = {int: "a whole number", str: "a text", dict: "an object", list: "a list"}
