"""Whatever stands in a sparse artifact, loading it gives an error of one line or the weights that its bytes say.

Tiny sparse artifacts are damaged at random: the header of the weights file as JSON and as bytes, masks, offsets, scales
and values, whole tensors with their types and shapes, cut and lengthened files, ``config.json``, ``paceline.json``.
Each goes through checkpoint, plan and a forward of the CPU kernels, or through the torch modules. What loads is
compared with an independent reading of the file. ``make fuzz`` runs 20,000 cases, the ordinary suite a twentieth,
always the same; ``PACELINE_CAMPAIGN=full make sanitize`` runs all of them under AddressSanitizer and UBSan. A case is
reproduced by its number; after a crash the artifact is still in the test's folder.
"""

import json
import math
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign import FULL, size
from conftest import TinyCheckpoint
from native_kernels import BLOCK_TOKENS, pool, require_native, run_alone
from safetensors.torch import load, save
from sparse_students import write_tiny_student
from torch import Tensor

from paceline.kernels.cpu.library import best_isa
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import interleave_rows
from paceline.server.errors import UserError
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "paceline.json"
Files = dict[str, bytes]
SHAPE: Mapping[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 40,
}
#: Name of each artifact: what it is made with.
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {"dtype": "int8", "int8_head": True, "sparsity": 0.6}),
    "tied": ("qwen2", {"dtype": "bf16", "sparsity": 0.5}),
    "2:4": ("llama", {"dtype": "fp16", "pattern": "2:4"}),
    "16:32": ("qwen3", {"dtype": "int8", "pattern": "16:32"}),
    "few ids": ("llama", {"dtype": "fp32", "kind": "draft", "ids": range(0, 40, 3)}),
}
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    31,
    33,
    64,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
)
ODD: tuple[Any, ...] = (
    *NUMBERS,
    math.nan,
    math.inf,
    None,
    True,
    False,
    "",
    "x",
    "a\nb",
    "é\ud800",
    [],
    {},
    [1, 2],
    {"a": 1},
    [[]],
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "U64",
    "C64",
    "F4",
    "NONE",
    "",
)
CASTS = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.bool,
)
TOKENS = [0, 5, 11, 3, 27]


@pytest.fixture(scope="module")
def artifacts(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("artifacts")
    made = []
    for name, (arch, form) in FORMS.items():
        parent = tiny_checkpoint(arch, **SHAPE)
        made.append(write_tiny_student(root / name.replace(":", "of"), parent, **form))
    return made


def read_header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def damage_header(files: Files, rng: random.Random) -> None:
    """Types, shapes, offsets and names, as JSON."""
    header, data = read_header(files[WEIGHTS])
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry, action = header[name], rng.randrange(7)
    if action == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif action == 1 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
    elif action == 2:
        entry["shape"] = rng.choice(
            [[], [0], [-1], [1] * 40, list(reversed(entry["shape"])), [*entry["shape"], 1], None]
        )
    elif action == 3:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 4, 1 << 20, -(1 << 40), 1 << 62])
    elif action == 4:
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(ODD)
    elif action == 5:
        header[
            rng.choice(
                [*header, "x", name + "_scale", name + "_bitmask", "model.layers.9.mlp.up_proj.weight_values"]
            )
        ] = header.pop(name)
    else:
        other = rng.choice(sorted(header.keys() - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    files[WEIGHTS] = with_header(header, data)


def damage_bytes(files: Files, rng: random.Random) -> None:
    """Bytes of any file, mostly where the lengths and the header of the weights are."""
    name = rng.choice([WEIGHTS, WEIGHTS, WEIGHTS, CONFIG, MANIFEST])
    raw = bytearray(files[name])
    reach = rng.choice([8, 64, len(raw), len(raw)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(reach, len(raw)))
        raw[at : at + rng.choice([0, 1, 1, 4])] = bytes(
            rng.randrange(256) for _ in range(rng.choice([0, 1, 1, 4]))
        )
    files[name] = bytes(raw)


def damage_length(files: Files, rng: random.Random) -> None:
    """Cut, lengthened, emptied or missing files."""
    name = rng.choice([WEIGHTS, WEIGHTS, WEIGHTS, CONFIG, MANIFEST])
    raw, action = files[name], rng.randrange(5)
    if action == 0:
        del files[name]
    elif action == 1:
        files[name] = b""
    elif action == 2:
        files[name] = raw + bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 4096])))
    else:
        files[name] = raw[
            : rng.choice([rng.randrange(len(raw)), len(raw) - 1, len(raw) - rng.randrange(1, 64)])
        ]


def damage_values(files: Files, rng: random.Random) -> None:
    """Elements of one tensor of a well-formed file, masks and offsets above all; the odd bit of a mask moves."""
    tensors = load(files[WEIGHTS])
    parts = [name for name in tensors if name.endswith(("_bitmask", "_row_offsets", "_scale", "_values"))]
    name = rng.choice(parts if rng.random() < 0.8 else sorted(tensors))
    tensor = tensors[name]
    flat = tensor.view(-1)
    if not len(flat):
        return
    at, other = rng.randrange(len(flat)), rng.randrange(len(flat))
    if tensor.dtype is torch.uint8 and rng.random() < 0.5:
        flat[at] ^= 1 << rng.randrange(8)
        flat[other] ^= 1 << rng.randrange(8)
    elif rng.random() < 0.3:
        flat[at], flat[other] = flat[other].clone(), flat[at].clone()
    elif tensor.dtype.is_floating_point:
        flat[at] = rng.choice([0.0, math.nan, math.inf, -math.inf, 1e30, -1.0])
    else:
        info = torch.iinfo(tensor.dtype)
        flat[at] = rng.choice([info.min, info.max, 0, 1, int(flat[at]) + (int(flat[at]) < info.max)])
    files[WEIGHTS] = save(tensors)


def damage_tensors(files: Files, rng: random.Random) -> None:
    """Whole tensors of a well-formed file: other types, shapes, lengths; dropped, added, exchanged."""
    tensors = load(files[WEIGHTS])
    name = rng.choice(sorted(tensors))
    tensor, action = tensors[name], rng.randrange(9)
    if action == 0:
        tensor = tensor.to(rng.choice(CASTS))
    elif action == 1:
        tensor = tensor[: rng.randrange(len(tensor) + 1)]
    elif action == 2:
        tensor = torch.cat((tensor, tensor[: rng.randrange(1, 5)]))
    elif action == 3:
        tensor = tensor.reshape(rng.choice([(-1,), (1, -1), (-1, 1), (*tensor.shape, 1)]))
    elif action == 4 and tensor.dim() == 2:
        tensor = rng.choice(
            [tensor.T, tensor[:, :-1], tensor[:, 1:], torch.cat((tensor, tensor[:, :1]), 1), tensor[:, :0]]
        )
    elif action == 5:
        other = rng.choice(sorted(tensors))
        tensors[other], tensor = tensor, tensors[other]
    elif action == 6:
        tensors[rng.choice(["x", f"{name}_scale", f"{name}_bitmask", name.removesuffix("_values")])] = (
            tensor.clone()
        )
    elif action == 7:
        tensor = tensor.flip(0)
    tensors[name] = tensor.contiguous()
    if action == 8:
        del tensors[name]
    files[WEIGHTS] = save({key: value.clone() for key, value in tensors.items()})


def damage_json(files: Files, rng: random.Random) -> None:
    """Values and keys of either JSON file, at any depth."""
    name = rng.choice([CONFIG, MANIFEST])
    value = json.loads(files[name])
    owner = value
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(owner[key], dict | list) and rng.random() < 0.7:
            owner = owner[key]
            continue
        action = rng.randrange(6)
        if action < 4:
            owner[key] = rng.choice(NUMBERS if isinstance(owner[key], int | float) and action else ODD)
        elif action == 4:
            del owner[key]
        elif isinstance(owner, dict):
            owner[rng.choice([*owner, *value, "rope_scaling", "attention_bias", "sliding_window"])] = owner[
                key
            ]
        break
    files[name] = json.dumps(value).encode("utf-8", errors="surrogatepass")


DAMAGES: tuple[Callable[[Files, random.Random], None], ...] = (
    damage_header,
    damage_bytes,
    damage_length,
    damage_values,
    damage_values,
    damage_tensors,
    damage_tensors,
    damage_json,
    damage_json,
)


def damaged(artifact: Path, case: int) -> tuple[Files, random.Random, str]:
    """The case's files, damaged once or twice, its generator for what else it needs, and what was done."""
    rng = random.Random(case)
    files = {name: (artifact / name).read_bytes() for name in (WEIGHTS, CONFIG, MANIFEST)}
    first = rng.choice(DAMAGES)
    first(files, rng)
    if rng.random() < 0.15:
        with suppress(Exception):  # what is broken already cannot always be broken again
            rng.choice(DAMAGES)(files, rng)
    return files, rng, first.__name__


def read_independently(files: Files) -> dict[str, Tensor]:
    """Every linear as dense fp32, decoded bit by bit with numpy; small enough for that."""
    tensors = load(files[WEIGHTS])
    dense = {}
    for name in [key.removesuffix("_bitmask") for key in tensors if key.endswith(".weight_bitmask")]:
        values, scale = tensors[f"{name}_values"].float().flatten(), tensors.get(f"{name}_scale")
        bits = np.unpackbits(tensors[f"{name}_bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
        whole = torch.zeros(bits.shape)
        whole[torch.from_numpy(bits)] = values
        dense[name] = whole if scale is None else whole * scale[:, None]
    return dense


def check_plan(plan: DecoderPlan, files: Files, weights: str) -> None:
    """Every packed linear of the blocks holds what the file says; float weights that int8 rounded only nearly."""
    dense = read_independently(files)
    if weights == "int8" and json.loads(files[MANIFEST])["weights"]["value_dtype"] != "int8":
        return
    for index, layer in enumerate(plan.layers):
        name = f"model.layers.{index}"
        q, k, v = (dense.get(f"{name}.self_attn.{part}_proj.weight") for part in "qkv")
        gate, up = (dense.get(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        pairs = [
            (layer.qkv, None if q is None or k is None or v is None else torch.cat((q, k, v))),
            (layer.output, dense.get(f"{name}.self_attn.o_proj.weight")),
            (layer.gate_up, None if gate is None or up is None else interleave_rows(gate, up)),
            (layer.down, dense.get(f"{name}.mlp.down_proj.weight")),
        ]
        for packed, expected in pairs:
            if expected is None:
                continue
            expected = expected.bfloat16().float() if packed.format == "bf16" else expected
            torch.testing.assert_close(packed.unpack(), expected, rtol=0, atol=0, equal_nan=True)


def run_modules(model: LoadedModel) -> None:
    """The linears of the first block, as torch modules."""
    assert isinstance(model.weights, Decoder)
    block: Any = model.weights.blocks[0]
    x = torch.ones(2, model.config.hidden_size, dtype=model.kv_dtype)
    with torch.no_grad():
        assert block.mlp(x).shape == x.shape
        assert block.attention.qkv(x).shape == (2, block.attention.qkv.out_features)


def load_and_run(folder: Path, files: Files, rng: random.Random) -> None:
    """Through the whole loader and a forward."""
    if rng.random() < 0.15:
        run_modules(
            ModelLoader(torch.device("cpu")).load(folder, rng.choice(["fp32", "bf16"]), fleeting=True)
        )
        return
    weights: Any = rng.choice(["fp32", "bf16", "int8"])
    kernels = pool("portable" if rng.random() < 0.3 else best_isa(), 1)
    model = ModelLoader(torch.device("cpu"), kernels).load(folder, weights, fleeting=True)
    plan = model.weights
    assert isinstance(plan, DecoderPlan)
    check_plan(plan, files, weights)
    tokens = [token % plan.vocab for token in TOKENS]
    logits = run_alone(plan, kernels, model.kv_dtype, tokens, chunk=rng.choice([1, 5]))
    assert logits.shape == (len(tokens), plan.head.out_features)
    assert len(tokens) <= BLOCK_TOKENS


def outcome(folder: Path, files: Files, rng: random.Random) -> str:
    """What became of a case: "loaded", "refused", or what must not be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    try:
        load_and_run(folder, files, rng)
    except UserError as error:
        return "refused" if str(error).isprintable() else f"not one line: {str(error)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_a_damaged_artifact_is_refused_or_loaded_as_it_is(
    artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    outcomes: Counter[str] = Counter()
    start = random.SystemRandom().randrange(1 << 32) if FULL else 0
    for case in range(start, start + size(20_000)):
        artifact = artifacts[case % len(artifacts)]
        files, rng, damage = damaged(artifact, case)
        found = outcome(tmp_path / "artifact", files, rng)
        assert found in ("loaded", "refused"), f"case {case}, {damage} of {artifact.name}: {found}"
        outcomes[found] += 1
    assert outcomes["refused"] > size(20_000) // 2, outcomes
    assert outcomes["loaded"] > size(20_000) // 20, outcomes
