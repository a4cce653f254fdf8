"""The roofline of decoding: bytes of weights read per forward, and how fast this machine reads.

Owns the two measurements and nothing of the servers. Every generated token of one stream needs one forward
(without speculation), and every forward reads each weight matrix once, so read bandwidth over bytes is the
ceiling in tokens per second. The kernels' own threads measure it, in a process of their own; where they were not
built torch does. Needs the ``server`` extra (torch, gguf); both are imported when called.
"""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: Larger than any last-level cache we know of, so that the figure is DRAM's.
BUFFER_BYTES = 1 << 30
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Weights:
    """What one forward reads of a checkpoint.

    Attributes:
        elements: weights that are multiplied with; an embedding that is not also the head is only looked up.
        stored_bytes: the same in the file's own format.
    """

    elements: int
    stored_bytes: int

    def bytes_in(self, weight_format: str) -> float:
        """Bytes per forward once loaded as ``weight_format``; ``"stored"`` is the file's own."""
        if weight_format == "stored":
            return float(self.stored_bytes)
        return self.elements * BYTES_PER_WEIGHT[weight_format]


def _total(tensors: Iterable[tuple[str, int, int]], embedding: str, head: str) -> Weights:
    """Sum (name, elements, bytes); the embedding counts only if it is also the head (tied)."""
    listed = list(tensors)
    untied = any(name == head for name, _, _ in listed)
    read = [(elements, size) for name, elements, size in listed if not (untied and name == embedding)]
    return Weights(sum(elements for elements, _ in read), sum(size for _, size in read))


def _safetensors(path: Path) -> Iterable[tuple[str, int, int]]:
    """Tensors listed in a safetensors header: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            elements = 1
            for size in entry["shape"]:
                elements *= size
            begin, end = entry["data_offsets"]
            yield name, elements, end - begin


def read_weights(model: Path) -> Weights:
    """Weights of a ``.gguf`` file or of a folder of safetensors."""
    if model.is_dir():
        tensors = (tensor for path in sorted(model.glob("*.safetensors")) for tensor in _safetensors(path))
        return _total(tensors, "model.embed_tokens.weight", "lm_head.weight")
    import gguf

    reader = gguf.GGUFReader(str(model))
    listed = ((tensor.name, int(tensor.n_elements), int(tensor.n_bytes)) for tensor in reader.tensors)
    return _total(listed, "token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What this machine reads from memory.

    Attributes:
        measured_with: ``"kernels"`` or ``"torch"``; the former is a little faster, as it reads huge pages.
    """

    bytes_per_s: float
    measured_with: str


def read_bandwidth() -> Bandwidth:
    """Streaming reads of memory far larger than the caches, on all cores, best of several."""
    command = (sys.executable, "-m", "paceline.kernels.bench.ceiling", str(BUFFER_BYTES >> 20))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Bandwidth(json.loads(done.stdout.splitlines()[-1])["read_gb_s"] * 1e9, "kernels")
    return Bandwidth(torch_bandwidth(), "torch")


def torch_bandwidth(threads: int | None = None, repeats: int = 5) -> float:
    """Bytes per second of torch's sum over a large tensor; best of ``repeats``."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    buffer = torch.ones(BUFFER_BYTES // 4)
    best_s = float("inf")
    for _ in range(repeats):
        started_s = time.perf_counter()
        buffer.sum()
        best_s = min(best_s, time.perf_counter() - started_s)
    return BUFFER_BYTES / best_s
