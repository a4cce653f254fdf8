"""Which way a sparse product takes: sparse or dense-expanded by its number of rows, and with what launch settings.

A table of entries (device name, format, shape class), the most exact match first. The shipped one is a guess on the
safe side: nothing was ever timed on a GPU. ``python -m paceline.kernels.gpu.tune`` measures and writes a table of the
machine, which goes before it: ``PACELINE_KERNEL_TABLE``, or ``kernel-table.json`` in the cache folder. Imports no
triton.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from paceline.kernels.formats import SparseTiles

#: Stands for any device, format or shape class.
ANY = "*"


class TableError(ValueError):
    """A table that cannot be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one product runs.

    Attributes:
        is_sparse: expand on chip; otherwise expand the whole weight into memory and multiply dense.
        splits: programs that share one row of tiles.
    """

    is_sparse: bool = True
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Launch:
    """Settings of one kernel; the inputs are split until there are at least ``programs`` programs."""

    num_warps: int
    num_stages: int
    programs: int

    def plan(self, tiles: SparseTiles, *, is_sparse: bool = True) -> Plan:
        """The settings for a weight."""
        splits = max(1, -(-self.programs // tiles.masks.shape[0]))
        return Plan(is_sparse, self.num_warps, self.num_stages, splits)


@dataclass(frozen=True, slots=True)
class Entry:
    """Settings for a device, a format and a shape class, any of which may be ``*``.

    Attributes:
        max_sparse_rows: rows of x up to which the sparse kernels are taken.
        gemv: for one row.
        gemm: for more.
    """

    device: str
    format: str
    shape: str
    max_sparse_rows: int
    gemv: Launch
    gemm: Launch

    def fit(self, device: str, format: str, shape: str) -> int | None:
        """How exactly it matches, more being better; None where it does not."""
        score = 0
        for own, wanted, weight in (
            (self.device, device, 4),
            (self.format, format, 2),
            (self.shape, shape, 1),
        ):
            if own == wanted:
                score += weight
            elif own != ANY:
                return None
        return score


def format_name(tiles: SparseTiles) -> str:
    """Such as ``bitmask-bf16`` or ``16:32-int8``."""
    kind = str(tiles.pattern) if tiles.pattern.structured else "bitmask"
    return f"{kind}-{tiles.value_dtype}"


def shape_class(out_features: int, in_features: int) -> str:
    """Both sizes rounded up to powers of two, such as ``1024x4096``."""
    return "x".join(str(1 << (n - 1).bit_length()) for n in (out_features, in_features))


def device_name(device: torch.device) -> str:
    """The GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def plan_for(tiles: SparseTiles, rows: int) -> Plan:
    """What the tables say for ``rows`` rows of x.

    Raises:
        TableError: the machine's table cannot be read.
    """
    entry = find(
        device_name(tiles.device), format_name(tiles), shape_class(tiles.out_features, tiles.in_features)
    )
    launch = entry.gemv if rows == 1 else entry.gemm
    return launch.plan(tiles, is_sparse=rows <= entry.max_sparse_rows)


@cache
def find(device: str, format: str, shape: str) -> Entry:
    """The best match; among equals the machine's own table wins."""
    known = [*_read(own_table()), *_read(None)]
    scores = [entry.fit(device, format, shape) for entry in known]
    best = max(range(len(known)), key=lambda i: (-1 if scores[i] is None else scores[i], -i))
    return known[best]


def own_table() -> Path:
    """Where the table of this machine is, or would be."""
    told = os.environ.get("PACELINE_KERNEL_TABLE")
    if told:
        return Path(told)
    cache_folder = os.environ.get("PACELINE_CACHE") or Path.home() / ".cache" / "paceline"
    return Path(cache_folder) / "kernel-table.json"


def write(entries: Sequence[Entry], path: Path) -> None:
    """Write a table, whole or not at all; what the file had for other devices, formats and shapes stays."""
    ours = {(entry.device, entry.format, entry.shape) for entry in entries}
    kept = [entry for entry in _read(path) if (entry.device, entry.format, entry.shape) not in ours]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"entries": [asdict(e) for e in [*kept, *entries]]}, indent=2) + "\n")
    temporary.replace(path)
    find.cache_clear()


def _read(path: Path | None) -> list[Entry]:
    """Entries of a file, none if it does not exist; None is the shipped one."""
    if path is None:
        text = resources.files("paceline.kernels.gpu").joinpath("default_table.json").read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        return []
    try:
        return [_entry(raw) for raw in json.loads(text)["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path}: not a table of kernels ({error}); remove it or run python -m paceline.kernels.gpu.tune"
        ) from error


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(**{**raw, "gemv": Launch(**raw["gemv"]), "gemm": Launch(**raw["gemm"])})
