"""Single linears, sparse beside dense, over real shapes: ``python -m paceline.kernels.bench.sparse_linears``.

A table of shapes x pruning x rows: the time, the share of the bandwidth ceiling of the format's own bytes, and where
sparse loses to dense. Each layer is repeated in memory until no cache holds it, so that weights come from where a whole
model's come from. Checks against the reference first; prints JSON last. Exit codes as ``sparse_step``.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from paceline.kernels import reference
from paceline.kernels.bench.ceiling import Reader
from paceline.kernels.bench.record import CheckFailedError, described, say, store, times_ms
from paceline.kernels.bench.sparse_shapes import LINEARS, Pruned, random_linear, weight_bytes
from paceline.kernels.cpu.library import KernelsMissing, Pool, linear_structs
from paceline.kernels.formats import Format, PackedLinear, Pattern

CASES = (*map(Pruned, (0.0, 0.25, 0.5, 0.6, 0.75, 0.9)), Pruned(0.75, Pattern(16, 64)))
ROWS = (1, 2, 4, 8, 16)
#: Memory that one round of copies reads at least; above the last-level caches that we know of.
_SPREAD_BYTES = 160 << 20
#: One activation in a million rounds the other way, as the reciprocal of a scale may be off by its last bit.
_TOLERANCE = 5e-4
_READ_BYTES = 512 << 20


def check(linear: PackedLinear, pool: Pool) -> None:
    """Compare one row block with the reference.

    Raises:
        CheckFailedError: above the tolerance.
    """
    x = torch.randn(3, linear.in_features)
    got, expected = pool.linear(x, linear), reference.linear(x, linear)
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error < _TOLERANCE:
        size = f"{linear.out_features} x {linear.in_features}"
        raise CheckFailedError(f"{linear.format} {size}: off by {error:.1e} from the reference")


def copies_of(linear: PackedLinear) -> list[PackedLinear]:
    """The layer in as many places as make ``_SPREAD_BYTES``."""
    count = max(1, -(-_SPREAD_BYTES // weight_bytes([linear])))
    return [replace(linear, data=linear.data.clone()) for _ in range(count)]


def time_layer(linear: PackedLinear, pool: Pool, repeats: int) -> dict[int, float]:
    """Median milliseconds of one layer, by rows."""
    copies = copies_of(linear)
    structs = linear_structs(copies)
    x, y = torch.randn(max(ROWS), linear.in_features), torch.empty(max(ROWS) * linear.out_features)
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(repeats):
        for rows in ROWS:
            times[rows] += times_ms(partial(pool.linears, structs, x[:rows], y), 1)
    return {rows: statistics.median(values) / len(copies) for rows, values in times.items()}


def measure(model: str, format: Format, pool: Pool, repeats: int, reader: Reader) -> Iterator[dict[str, Any]]:
    """One entry per shape, pruning and number of rows, printed as they come.

    Raises:
        CheckFailedError: see ``check``.
    """
    for out, width in LINEARS[model]:
        dense: dict[int, float] = {}
        for case in CASES:
            check(random_linear(min(out, 300), width, case, format, pool), pool)
            linear = random_linear(out, width, case, format, pool)
            times = time_layer(linear, pool, repeats)
            reader.read(repeats=1)
            dense = dense or times
            ceiling = weight_bytes([linear]) / reader.bytes_per_s * 1e3
            entries = [
                {
                    "model": model,
                    "out": out,
                    "in": width,
                    "sparsity": case.sparsity,
                    "pattern": str(case.pattern),
                    "rows": rows,
                    "ms": round(ms, 4),
                    "share": round(ceiling / ms, 3),
                    "over_dense": round(dense[rows] / ms, 3),
                }
                for rows, ms in times.items()
            ]
            _show(f"{out} x {width}", case, entries)
            yield from entries


def _show(shape: str, case: Pruned, entries: list[dict[str, Any]]) -> None:
    cells = []
    for entry in entries:
        mark = "-" if entry["over_dense"] < 1 else " "
        cells.append(f"{entry['ms']:8.3f} {entry['share']:4.0%} {entry['over_dense']:5.2f}x{mark}")
    say(f"  {shape:>14} {case!s:>9} " + "  ".join(cells))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sparse_linears", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=[*LINEARS, "all"], default="all", help="shapes to run")
    parser.add_argument("--format", choices=get_args(Format), default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds; medians are shown")
    parser.add_argument("--quick", action="store_true", help="SmolLM2's shapes and 3 rounds only")
    parser.add_argument(
        "--out", type=Path, help="result file; default: one of today in the checkout's results"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the bench; returns the exit code."""
    chosen = _arguments(argv)
    names = ["smollm2-135m"] if chosen.quick else list(LINEARS) if chosen.model == "all" else [chosen.model]
    rounds = 3 if chosen.quick else chosen.rounds
    try:
        pool = Pool(chosen.threads)
        reader = Reader(pool, _READ_BYTES)
        reader.read(repeats=7)
        say(
            f"memory is read at {reader.bytes_per_s / 1e9:.1f} GB/s; per cell: ms, share of the ceiling, to dense"
        )
        entries: list[dict[str, Any]] = []
        for name in names:
            say(f"{name} {chosen.format}; rows: {', '.join(map(str, ROWS))}")
            entries += measure(name, chosen.format, pool, rounds, reader)
    except (CheckFailedError, KernelsMissing, OSError) as error:
        sys.stderr.write(f"sparse_linears: {error}\n")
        return 1
    losing = [e for e in entries if e["sparsity"] and e["over_dense"] < 1]
    say(
        f"sparse loses to dense in {len(losing)} of {sum(1 for e in entries if e['sparsity'])} cells, marked -"
    )
    store(
        described("sparse_linears", pool, rounds, format=chosen.format, entries=entries),
        chosen.out,
        chosen.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
