import copy
import json
from pathlib import Path
from typing import Any

import pytest

from paceline.server.errors import ArtifactError
from paceline.server.models.manifest import (
    check_tokenizer,
    manifest_json,
    parse_manifest,
    read_manifest,
    write_manifest,
)

RAW: dict[str, Any] = {
    "schema": 1,
    "kind": "draft",
    "base": {"id": "m", "tokenizer_sha256": "aa", "vocab_size": 300, "weights_sha256": "bb", "future": [1]},
    "weights": {"format": "n:m", "n": 2, "m": 4, "value_dtype": "fp16", "future": None},
    "shared_with_target": ["model.embed_tokens.weight"],
    "draft_vocab": "draft_vocab_ids",
    "recipe": {"init": {"method": "cut", "layers": [0, 1]}},
    "provenance": {"seed": 3},
    "measured": [{"dataset": "x", "alpha": 0.5, "future": True}],
    "future": {"deep": {"er": 1}},
}


def test_everything_survives_a_round_trip_unknown_keys_too(tmp_path: Path) -> None:
    manifest = parse_manifest(RAW, "here")
    write_manifest(tmp_path, manifest)

    assert json.loads((tmp_path / "paceline.json").read_text()) == RAW
    assert read_manifest(tmp_path) == manifest
    assert manifest_json(manifest) == RAW
    assert [file.name for file in tmp_path.iterdir()] == ["paceline.json"]


def test_what_may_be_absent_has_defaults() -> None:
    raw = {key: RAW[key] for key in ("schema", "kind", "base", "weights")}
    manifest = parse_manifest(raw, "here")

    assert manifest.shared_with_target == ()
    assert manifest.draft_vocab is None
    assert manifest.measured == ()


def test_a_folder_without_a_manifest_is_a_plain_checkpoint(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), 2, "another version of Paceline"),
        (("schema",), True, "schema must be a whole number"),
        (("kind",), "target", "kind must be one of draft, student, expert"),
        (("kind",), None, "kind must be a text, but is missing"),
        (("base",), [], "base must be an object"),
        (("base", "vocab_size"), "300", "base: vocab_size must be a whole number, but is '300'"),
        (("base", "tokenizer_sha256"), None, "tokenizer_sha256 must be a text"),
        (("weights", "format"), "fp8", "weights: format must be one of fp32"),
        (("shared_with_target",), [1], "list of names"),
        (("draft_vocab",), 5, "draft_vocab must be a text"),
        (("measured",), {}, "measured must be a list"),
        (("measured",), [1], "list of objects"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(path: tuple[str, ...], value: object, says: str) -> None:
    raw = copy.deepcopy(RAW)
    table = raw
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value

    with pytest.raises(ArtifactError) as caught:
        parse_manifest(raw, "draft/paceline.json")

    assert says in str(caught.value)
    assert str(caught.value).startswith("draft/paceline.json")
    assert "\n" not in str(caught.value)


def test_broken_json_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "paceline.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"paceline\.json"):
        read_manifest(tmp_path)


def test_another_tokenizer_is_refused_with_both_hashes() -> None:
    check_tokenizer("aaaa", "aaaa")
    with pytest.raises(ArtifactError, match=r"bbbb.*aaaa"):
        check_tokenizer("aaaa", "bbbb")
