"""``python -m paceline.kernels.gpu.tune``: measures on this machine's GPU and writes its table (see ``table``).

For every format and layer shape it times the kernels' launch settings with one row and with eight, and then finds up to
how many rows the sparse product beats expanding the whole weight and multiplying dense.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from paceline.kernels.formats import Pattern, SparseTiles
from paceline.kernels.gpu import table
from paceline.kernels.gpu.runtime import lazy
from paceline.kernels.gpu.shapes import LAYERS, random_tiles
from paceline.kernels.gpu.table import Entry, Launch, Plan

#: Milliseconds that a call takes.
Timer = Callable[[Callable[[], object]], float]

CONFIGS = [
    Launch(warps, stages, programs)
    for warps, stages, programs in product((2, 4, 8), (1, 2, 3), (1, 132, 264, 528))
]
ROWS = (1, 2, 4, 8, 16, 32, 64)
_GEMM_ROWS = 8
_FORMATS = tuple(product((Pattern(), Pattern(16, 32)), ("bf16", "fp16", "int8")))


def tune(device: torch.device, shapes: Mapping[str, tuple[int, int]], time_ms: Timer) -> Iterator[Entry]:
    """An entry per format and shape class, each settled as soon as it is yielded."""
    for (pattern, dtype), shape in product(_FORMATS, shapes.values()):
        tiles = random_tiles(shape, pattern, 0.5, dtype, device)
        gemv = _fastest(tiles, 1, time_ms)
        gemm = _fastest(tiles, _GEMM_ROWS, time_ms)
        yield Entry(
            table.device_name(device),
            table.format_name(tiles),
            table.shape_class(*shape),
            _most_rows(tiles, gemv, gemm, time_ms),
            gemv,
            gemm,
        )


def _fastest(tiles: SparseTiles, rows: int, time_ms: Timer) -> Launch:
    x = _activations(tiles, rows)
    return min(CONFIGS, key=lambda config: _time(x, tiles, config.plan(tiles), time_ms))


def _most_rows(tiles: SparseTiles, gemv: Launch, gemm: Launch, time_ms: Timer) -> int:
    """The greatest number of rows up to which sparse has never lost; 0 if dense wins from the first."""
    most = 0
    for rows in ROWS:
        x = _activations(tiles, rows)
        launch = gemv if rows == 1 else gemm
        dense = _time(x, tiles, Plan(is_sparse=False), time_ms)
        if _time(x, tiles, launch.plan(tiles), time_ms) > dense:
            break
        most = rows
    return most


def _time(x: Tensor, tiles: SparseTiles, plan: Plan, time_ms: Timer) -> float:
    sparse_linear = lazy("sparse_linear", "sparse_linear", tiles.device.type)
    return time_ms(partial(sparse_linear, x, tiles, None, plan))


def _activations(tiles: SparseTiles, rows: int) -> Tensor:
    dtype = torch.bfloat16 if tiles.values.dtype is torch.int8 else tiles.values.dtype
    return torch.randn(rows, tiles.in_features, device=tiles.device).to(dtype)


def do_bench(call: Callable[[], object]) -> float:
    """Triton's own timer: median milliseconds, caches cleared in between."""
    from triton.testing import do_bench as measured

    return float(measured(call, return_mode="median"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, writing after every entry; 1 where there is nothing to tune."""
    parser = argparse.ArgumentParser(prog="python -m paceline.kernels.gpu.tune", description=__doc__)
    parser.add_argument("--layer", action="append", choices=list(LAYERS), help="only these shapes")
    chosen = parser.parse_args(arguments).layer or list(LAYERS)
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA GPU here: nothing to tune, the shipped table stays in use\n")
        return 1
    entries: list[Entry] = []
    for entry in tune(torch.device("cuda"), {name: LAYERS[name] for name in chosen}, do_bench):
        entries = [e for e in entries if (e.format, e.shape) != (entry.format, entry.shape)] + [entry]
        table.write(entries, table.own_table())
        sys.stdout.write(f"{entry}\n")
    sys.stdout.write(f"written to {table.own_table()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
