"""The roofline: bytes of weights per forward, and read bandwidth."""

import json
import struct
import sys
from pathlib import Path

import pytest

from paceline.clients import ceiling
from paceline.clients.ceiling import Bandwidth, Weights, read_bandwidth, read_weights, torch_bandwidth


def test_weights_of_a_tied_and_an_untied_folder(tmp_path: Path) -> None:
    def write(**shapes: list[int]) -> Weights:
        offset, header = 0, {}
        for name, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            key = name.replace("__", ".")
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {}, **header}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
        return read_weights(tmp_path)

    tied = write(model__embed_tokens__weight=[10, 4], layer=[4, 4])
    assert (tied.elements, tied.stored_bytes) == (56, 112)
    untied = write(model__embed_tokens__weight=[10, 4], layer=[4, 4], lm_head__weight=[10, 4])
    assert untied == tied  # the table that is only looked up is not read
    assert (tied.bytes_in("fp32"), tied.bytes_in("int4"), tied.bytes_in("stored")) == (224, 28, 112)


def test_weights_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in (("token_embd.weight", (10, 4)), ("output.weight", (10, 4)), ("blk", (4, 4))):
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_weights(tmp_path / "m.gguf") == Weights(elements=56, stored_bytes=112)


def test_torch_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(ceiling, "BUFFER_BYTES", 1 << 20)
    readings = iter([0.0, 4.0, 10.0, 12.0])  # two passes: 4 s and 2 s
    monkeypatch.setattr("paceline.clients.ceiling.time.perf_counter", lambda: next(readings))
    assert torch_bandwidth(threads=1, repeats=2) == (1 << 20) / 2.0


def test_the_kernels_measure_if_they_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(ceiling, "torch_bandwidth", lambda: 3.0)
    fake.write_text("#!/bin/sh\necho '{\"read_gb_s\": 12.5}'\n", encoding="utf-8")
    fake.chmod(0o755)
    assert read_bandwidth() == Bandwidth(12.5e9, "kernels")
    fake.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert read_bandwidth() == Bandwidth(3.0, "torch")
