"""Random damage to the files of a sparse artifact: well-formed files that lie, and files that are not well-formed."""

import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "paceline.json"
Files = dict[str, bytes]
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
