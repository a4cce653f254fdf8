"""Sparse artifacts that contradict themselves are refused in one line by both executors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_drafts import HEAD
from native_kernels import pool, require_native
from safetensors.torch import load_file, save_file
from sparse_students import write_tiny_student
from torch import Tensor

from paceline.server.errors import ArtifactError, UserError
from paceline.server.models.loader import ModelLoader

pytestmark = pytest.mark.usefixtures("own_cache")

DOWN = "model.layers.0.mlp.down_proj.weight"
Tensors = dict[str, Tensor]


def native(path: Path) -> None:
    require_native()
    ModelLoader(torch.device("cpu"), pool("portable")).load(path, "fp32")


def decoder(path: Path) -> None:
    ModelLoader(torch.device("cpu")).load(path, "fp32")


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        own = load_file(folder / "model.safetensors")
        change(own)
        save_file(own, folder / "model.safetensors")

    return apply


def replaced(part: str, value: Callable[[Tensor], Tensor], name: str = DOWN) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        own[name + part] = value(own[name + part]).contiguous()

    return tensors(change)


def removed(part: str) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        del own[DOWN + part]

    return tensors(change)


def added(name: str, value: Tensor) -> Callable[[Path], None]:
    def change(own: Tensors) -> None:
        own[name] = value

    return tensors(change)


def weights(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change_json(folder / "paceline.json", weights=fields)
        change_json(folder / "config.json", quantization_config={"quant_method": "paceline", **fields})

    return apply


def flipped(mask: Tensor) -> Tensor:
    mask[3, 2] ^= 16
    return mask


def shifted(offsets: Tensor) -> Tensor:
    offsets[5] += 1
    return offsets


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit more or less": (replaced("_bitmask", flipped), r"bits set, but there are \d+ values"),
    "values cut off": (replaced("_values", lambda v: v[:-1]), r"bits set, but there are \d+ values"),
    "offsets that lie": (replaced("_row_offsets", shifted), "row offsets do not count"),
    "offsets cut off": (replaced("_row_offsets", lambda o: o[:-1]), r"row offsets must be int64 \[65\]"),
    "offsets of another type": (
        replaced("_row_offsets", lambda o: o.int()),
        r"row offsets must be int64 \[65\]",
    ),
    "a mask of another type": (replaced("_bitmask", lambda m: m.char()), "bitmask must be uint8"),
    "a mask of another width": (
        replaced("_bitmask", lambda m: m[:, :-1]),
        r"bitmask must be uint8 \[out, 12\]",
    ),
    "a mask of other rows": (
        replaced("_bitmask", lambda m: m[:-1]),
        r"scales must be fp32 \[63\], but are float32 \[64\]",
    ),
    "scales cut off": (replaced("_scale", lambda s: s[:-1]), r"scales must be fp32 \[64\]"),
    "scales of another type": (replaced("_scale", lambda s: s.half()), r"scales must be fp32 \[64\]"),
    "values of another type": (replaced("_values", lambda v: v.half()), "int8 values need one scale"),
    "a value of -128": (replaced("_values", lambda v: v.fill_(-128)), "there is a -128"),
    "no mask": (removed("_bitmask"), f"tensor {DOWN}_bitmask is missing"),
    "no values": (removed("_values"), f"tensor {DOWN}_values is missing"),
    "no offsets": (removed("_row_offsets"), f"tensor {DOWN}_row_offsets is missing"),
    "no scales": (removed("_scale"), f"tensor {DOWN}_scale is missing"),
    "dense and sparse": (added(DOWN, torch.zeros(64, 96)), f"{DOWN} is stored dense and sparse at once"),
    "a sparse head": (
        added(f"{HEAD}_bitmask", torch.zeros(300, 8)),
        f"{HEAD} is sparse, but only the projections",
    ),
    "another type in the manifest": (
        weights(format="bitmask", value_dtype="fp32"),
        "says unstructured fp32|_scale is",
    ),
    "another pattern in the manifest": (
        weights(format="n:m", value_dtype="int8", n=2, m=4),
        f"{DOWN}_row_offsets is not of a 2:4 int8|_row_offsets is not of a 2:4",
    ),
    "n:m without n": (weights(format="n:m", value_dtype="int8", m=4), "needs whole numbers n and m"),
    "n above m": (weights(format="n:m", value_dtype="int8", n=5, m=4), "needs 0 < n < m, not 5:4"),
    "a bitmask with n": (
        weights(format="bitmask", value_dtype="int8", n=2, m=4),
        "format bitmask has no n and m",
    ),
    "no type of values": (weights(format="bitmask"), "value_dtype must be one of fp32"),
    "a dense format": (weights(format="int8"), "says weights.format int8, but .* is sparse|quantization"),
    "config.json says otherwise": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config must be .*paceline.* but is .*gptq",
    ),
    "config.json says nothing": (
        lambda folder: change_json(folder / "config.json", quantization_config=None),
        "quantization_config must be .* but is None",
    ),
    "another model's configuration": (
        lambda folder: change_json(folder / "config.json", intermediate_size=104),
        "bitmask must be uint8|but the configuration says",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused_in_one_line(case: str, target: Path, tmp_path: Path):
    change, says = BROKEN[case]
    folder = write_tiny_student(tmp_path / "s", target, dtype="int8")
    change(folder)
    for load in (native, decoder):
        with pytest.raises(UserError, match=says) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def test_a_group_with_another_count_is_refused(target: Path, tmp_path: Path):
    folder = write_tiny_student(tmp_path / "s", target, dtype="int8", pattern="16:32")
    replaced("_bitmask", flipped)(folder)
    with pytest.raises(ArtifactError, match=f"{DOWN}: a 16:32 weight needs 16 bits in every group of 32"):
        native(folder)
