"""Files that only peers need: requantizing to Q8_0, the bf16 folder, fetching; from tiny GGUF files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.clients import peer_files
from paceline.clients.peers import PeerError

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bench"


def write_gguf(path: Path, columns: int = 64, layers: int = 2) -> dict[str, Any]:
    """A Q4_1 file with one matrix, one vector and all kinds of metadata; returns the values stored."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(2)
    writer.add_rope_freq_base(1e5)
    writer.add_token_list(["<s>", "ä", "b c"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_token_types([3, 1, 1])
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    matrix = np.random.default_rng(0).standard_normal((3, columns)).astype("float32")
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quants.quantize(matrix, kind) if columns % 32 == 0 else matrix
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind if columns % 32 == 0 else None)
    writer.add_tensor("output_norm.weight", np.arange(columns, dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"matrix": gguf.quants.dequantize(packed, kind) if columns % 32 == 0 else matrix}


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(str(path)).fields.values()
    return {field.name: (field.types, field.contents()) for field in fields if field.name[:5] != "GGUF."}


def test_q8_0_keeps_values_metadata_and_vectors(tmp_path: Path, cache: Path) -> None:
    stored = write_gguf(tmp_path / "m.gguf")
    made = peer_files.q8_0_file(tmp_path / "m.gguf")
    before, after = metadata(tmp_path / "m.gguf"), metadata(made)
    assert after.pop("general.file_type")[1] == gguf.LlamaFileType.MOSTLY_Q8_0
    before.pop("general.file_type")
    assert after == before
    assert "tokenizer.ggml.tokens" in after
    assert (peer_files.quant_name(tmp_path / "m.gguf"), peer_files.quant_name(made)) == ("Q4_1", "Q8_0")
    matrix, vector = gguf.GGUFReader(str(made)).tensors
    assert (matrix.tensor_type.name, vector.tensor_type.name) == ("Q8_0", "F32")
    assert list(matrix.shape) == [64, 3]
    values = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    step = abs(stored["matrix"]).max() / 127
    assert 0 < abs(values - stored["matrix"]).max() <= step  # rounded, and no more than that
    assert (vector.data == np.arange(64)).all()


def test_q8_0_is_made_once_per_source(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    made = peer_files.q8_0_file(tmp_path / "m.gguf")
    assert made.parent == cache
    assert list(cache.iterdir()) == [made]  # nothing half-done is left
    monkeypatch.setattr(peer_files, "write_q8_0", lambda *_: pytest.fail("made again"))
    assert peer_files.q8_0_file(tmp_path / "m.gguf") == made
    write_gguf(tmp_path / "m.gguf", layers=3)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        peer_files.q8_0_file(tmp_path / "m.gguf")


def test_rows_that_do_not_fit_are_told(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", columns=20)
    with pytest.raises(PeerError, match=r"token_embd\.weight are no multiple of 32"):
        peer_files.q8_0_file(tmp_path / "odd.gguf")
    assert list(cache.iterdir()) == []


def test_layers_are_counted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", layers=7)
    assert peer_files.block_count(tmp_path / "m.gguf") == 7


def test_a_gguf_file_becomes_a_folder_with_all_layers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", layers=3)
    script = "import json, os, sys; os.mkdir(sys.argv[-2]); json.dump(sys.argv[1:], open(sys.argv[-2] + '/a', 'w'))"
    monkeypatch.setattr(peer_files, "PACELINE", (sys.executable, "-c", script))
    folder = peer_files.hf_folder(tmp_path / "m.gguf")
    assert folder.parent == cache
    asked = json.loads((folder / "a").read_text(encoding="utf-8"))
    assert asked[:4] == ["init-draft", str(tmp_path / "m.gguf"), "--layers", "0,1,2"]
    monkeypatch.setattr(peer_files, "PACELINE", (sys.executable, "-c", "raise SystemExit('asked again')"))
    assert peer_files.hf_folder(tmp_path / "m.gguf") == folder
    write_gguf(tmp_path / "m.gguf", layers=4)
    with pytest.raises(PeerError, match=r"bf16 folder of m\.gguf: asked again"):
        peer_files.hf_folder(tmp_path / "m.gguf")


def test_a_folder_is_taken_as_it_is(tiny_checkpoint: Callable[..., Path]) -> None:
    assert peer_files.hf_folder(tiny_checkpoint("llama")) == tiny_checkpoint("llama")


@pytest.mark.parametrize("indent", [None, 2])
def test_pull_reads_the_path_from_the_json_that_comes_last(
    monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    record = json.dumps({"model": "any", "path": "/somewhere/model.gguf"}, indent=indent)
    monkeypatch.setattr(
        peer_files, "PACELINE", (sys.executable, "-c", f"print('fetching'); print({record!r})")
    )
    assert peer_files.pull("any") == Path("/somewhere/model.gguf")


def test_pull_takes_what_lies_here_and_tells_what_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert peer_files.pull(str(tmp_path)) == tmp_path.resolve()
    complaint = "import sys; sys.exit('paceline: no model called nonsense')"
    monkeypatch.setattr(peer_files, "PACELINE", (sys.executable, "-c", complaint))
    with pytest.raises(PeerError, match="paceline pull nonsense: paceline: no model called nonsense"):
        peer_files.pull("nonsense")
