import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import open_checkpoint


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that the test may damage."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, held in weight_map.items() if held == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_come_as_stored(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    opened = open_checkpoint(folder)

    assert opened.path == folder
    assert opened.hf_config["model_type"] == "llama"
    assert opened.tensor_names() == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.tensor(name), tensor, rtol=0, atol=0)


def test_the_hash_is_that_of_the_file(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert open_checkpoint(folder).weights_sha256() == digest


def test_shards_read_as_one(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    whole = open_checkpoint(folder).weights_sha256()
    shard(folder)

    opened = open_checkpoint(folder)

    assert opened.tensor_names() == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.tensor(name), tensor, rtol=0, atol=0)
    before = opened.weights_sha256()
    assert before != whole
    second = load_file(folder / "model-00002-of-00002.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in second.items()}, folder / "model-00002-of-00002.safetensors"
    )
    assert open_checkpoint(folder).weights_sha256() != before


def test_a_missing_or_incomplete_shard_is_named(folder: Path) -> None:
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, second)
    with pytest.raises(ArtifactError, match=f"lacks {dropped}"):
        open_checkpoint(folder)

    second.unlink()
    with pytest.raises(ArtifactError, match="lacks model-00002"):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 7, 500, -100])
def test_a_cut_file_is_refused(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])

    with pytest.raises(ArtifactError, match="damaged or cut short"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        open_checkpoint(folder)


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tensor lm_head\.bias"):
        open_checkpoint(folder).tensor("lm_head.bias")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        open_checkpoint(folder)
    with pytest.raises(ArtifactError, match="no model at"):
        open_checkpoint(tmp_path / "nowhere")


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ArtifactError, match="pickled weights"):
            open_checkpoint(path)


def test_tensors_lie_where_native_code_may_read_them(tmp_path: Path) -> None:
    """A header may have any length; what is mapped behind it then lies at odd addresses."""
    values = torch.arange(6, dtype=torch.float32)
    save_file({"w": values}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    odd = struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    (tmp_path / "config.json").write_text("{}")
    tensor = open_checkpoint(tmp_path).tensor("w")
    assert tensor.data_ptr() % tensor.element_size() == 0
    assert torch.equal(tensor, values)
