"""How many bytes a sparse product loads per weight, counted from the addresses that its kernel really loads.

Memory comes in sectors of 32 bytes: a program that touches one byte pays for 32. Triton's interpreter is made to record
every load; per program, each sector of the weight's tensors counts once, as registers and caches keep it for the
program's own use. Every address must lie in a tensor that is known here, so that reading beside one shows. Run as a
module it prints JSON; its process must be one whose triton interprets.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from paceline.kernels.formats import Pattern, SparseTiles, SparseWeight, pack_tiles
from paceline.kernels.gpu.sparse_linear import sparse_linear
from paceline.kernels.gpu.table import Plan, format_name

SECTOR_BYTES = 32
#: Inputs of real layers: SmolLM2's hidden and feed-forward size, Llama-7B's hidden size.
_INPUTS = (576, 1536, 4096)
_OUTPUTS = 32
#: fp16 has the addresses of bf16.
_DTYPES = (torch.bfloat16, torch.int8)


class StrayLoadError(AssertionError):
    """A kernel loads from outside of its tensors."""


@dataclass
class Sectors:
    """Sectors that programs touched, by tensor."""

    ranges: dict[str, tuple[int, int]]
    seen: dict[str, set[tuple[Any, int]]] = field(default_factory=dict)

    def add(self, program: tuple[int, ...], addresses: Any) -> None:
        """Note one load's addresses, of the lanes that are not masked."""
        known = np.zeros(addresses.shape, dtype=bool)
        for name, (start, stop) in self.ranges.items():
            inside = (addresses >= start) & (addresses < stop)
            known |= inside
            sectors = np.unique(addresses[inside] // SECTOR_BYTES).tolist()
            self.seen.setdefault(name, set()).update((program, sector) for sector in sectors)
        if not known.all():
            raise StrayLoadError(
                f"program {program} loads {int((~known).sum())} addresses outside of its tensors"
            )

    def num_bytes(self, *names: str) -> int:
        """Bytes of the sectors of some tensors, summed over programs."""
        return SECTOR_BYTES * sum(len(self.seen.get(name, ())) for name in names)


@contextmanager
def recorded(tensors: Mapping[str, Tensor]) -> Iterator[Sectors]:
    """Record every load inside the block; tensors that kernels make themselves must not be loaded from."""
    spans = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()}
    sectors = Sectors(spans)
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def recording(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        sectors.add(tuple(self.grid_idx), np.broadcast_to(ptrs.data, mask.data.shape)[mask.data])
        return load(self, ptrs, mask, *rest)

    builder.create_masked_load = recording
    try:
        yield sectors
    finally:
        builder.create_masked_load = load


@dataclass(frozen=True, slots=True)
class Traffic:
    """One product's loads.

    Attributes:
        kernel: gemv or gemm.
        format: with its sparsity.
        bytes_per_weight: of all parts of the weight, zeros counting as weights.
        ceiling: what the format needs at least: the stored values and one bit per weight.
        x_bytes_per_weight: of the activations, mostly from cache on a GPU.
    """

    kernel: str
    format: str
    shape: str
    bytes_per_weight: float
    ceiling: float
    x_bytes_per_weight: float

    @property
    def ratio(self) -> float:
        """Bytes loaded over bytes needed."""
        return self.bytes_per_weight / self.ceiling


def weight_tensors(tiles: SparseTiles) -> dict[str, Tensor]:
    """The parts of a weight by name."""
    parts = {"masks": tiles.masks, "values": tiles.values, "starts": tiles.starts, "scale": tiles.scale}
    return {name: part for name, part in parts.items() if part is not None}


def measure(tiles: SparseTiles, rows: int, sparsity: str) -> Traffic:
    """Run one product and count its sectors."""
    x = torch.ones(rows, tiles.in_features, dtype=_activation(tiles))
    parts = weight_tensors(tiles)
    with recorded({**parts, "x": x}) as sectors:
        sparse_linear(x, tiles, None, Plan())
    weights = tiles.out_features * tiles.in_features
    stored = int(_set_bits(tiles)) * tiles.values.element_size()
    return Traffic(
        "gemv" if rows == 1 else "gemm",
        f"{format_name(tiles)} {sparsity}",
        f"{tiles.out_features}x{tiles.in_features}",
        sectors.num_bytes(*parts) / weights,
        stored / weights + 1 / 8,
        sectors.num_bytes("x") / weights,
    )


def _activation(tiles: SparseTiles) -> torch.dtype:
    return torch.bfloat16 if tiles.values.dtype is torch.int8 else tiles.values.dtype


def _set_bits(tiles: SparseTiles) -> int:
    return int(tiles.unpack().kept().sum())


def cases() -> Iterator[tuple[SparseTiles, int, str]]:
    """Weight, rows of x and sparsity of every product that the report counts."""
    generator = torch.Generator().manual_seed(0)
    kinds = ((Pattern(), 0.5), (Pattern(), 0.75), (Pattern(16, 32), 0.5), (Pattern(16, 64), 0.75))
    for width in _INPUTS:
        for pattern, sparsity in kinds:
            for dtype in _DTYPES:
                tiles = pack_tiles(random_weight(width, pattern, sparsity, dtype, generator))
                yield tiles, 1, f"{sparsity:.0%}"
                if width == _INPUTS[0]:
                    yield tiles, 5, f"{sparsity:.0%}"


def random_weight(
    width: int, pattern: Pattern, sparsity: float, dtype: torch.dtype, generator: torch.Generator
) -> SparseWeight:
    """[32, width] with random places and ones at them."""
    order = torch.rand(_OUTPUTS, width, generator=generator)
    if pattern.structured:
        groups = order.view(_OUTPUTS, -1, pattern.m)
        kept = (groups.argsort(-1).argsort(-1) < pattern.n).view(_OUTPUTS, width)
    else:
        kept = order > sparsity
    scale = torch.ones(_OUTPUTS) if dtype is torch.int8 else None
    return SparseWeight.from_dense(kept.to(dtype), kept, pattern=pattern, scale=scale)


if __name__ == "__main__":
    json.dump([asdict(measure(*case)) for case in cases()], sys.stdout)
