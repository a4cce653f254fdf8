"""Sparse decoders beside their dense parent: ``python -m paceline.kernels.bench.sparse_step``.

Prints the ceiling first, checks the sparse linears against the reference and the rows of a batch bit for bit, then
times the linears alone (beside the time that reading their format's bytes takes) and whole forwards, all sparsities in
alternating rounds of one run; prints JSON last. Exit codes: 0 done, 1 a check failed or the kernels are missing.
"""

import argparse
import os
import random
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from paceline.kernels.bench.ceiling import Reader
from paceline.kernels.bench.decode_step import Case, check_linears, check_rows, run_case
from paceline.kernels.bench.record import CheckFailedError, described, say, store, times_ms
from paceline.kernels.bench.shapes import SHAPES, executor, random_plan
from paceline.kernels.bench.sparse_shapes import Pruned, blocks_of, prune, weight_bytes
from paceline.kernels.cpu.library import KernelsMissing, Pool, linear_structs
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import Format, Pattern

CASES = (Pruned(0.0), Pruned(0.5), Pruned(0.75), Pruned(0.75, Pattern(16, 64)))
ROWS = (1, 5, 8)
_BLOCKS = 1024
_PER_ROUND = 5
#: Runs until the caches hold this contender's weights and not those of the one before: a last-level cache of 300 MB,
#: which takes what L2 lets go, needs four (dense SmolLM2: 4.0, 3.7, 3.5, 2.9, then 2.5 ms).
_WARM = 5


class Contender:
    """One sparsity's decoder, ready to be timed."""

    def __init__(self, plan: DecoderPlan, pool: Pool) -> None:
        self._pool = pool
        self.model = executor(plan, pool, blocks=_BLOCKS)
        linears = blocks_of(plan)
        self._structs = linear_structs(linears)
        self._x = torch.randn(max(ROWS), max(linear.in_features for linear in linears))
        self._y = torch.empty(max(ROWS) * max(linear.out_features for linear in linears))
        self.linear_bytes, self.step_bytes = weight_bytes(linears), plan.bytes_per_forward

    def linears(self, rows: int) -> None:
        """The linears of all blocks, one after another."""
        self._pool.linears(self._structs, self._x[:rows], self._y)

    def step(self, rows: int) -> None:
        """A whole forward of one sequence."""
        run_case(self.model, Case(f"1x{rows}", 1, rows))


def time_all(contenders: dict[Pruned, Contender], reader: Reader, rounds: int) -> dict[Any, float]:
    """Median milliseconds by (what, pruned, rows); each round takes the rows in another order."""
    times: dict[Any, list[float]] = defaultdict(list)
    order = random.Random(0)
    for _ in range(rounds):
        reader.read(repeats=_WARM + 1)  # with caches as warm as a contender's
        for rows in order.sample(ROWS, len(ROWS)):
            for what in ("linears", "step"):
                for pruned, contender in contenders.items():
                    run = partial(getattr(contender, what), rows)
                    times_ms(run, _WARM)
                    times[what, pruned, rows] += times_ms(run, _PER_ROUND)
    return {key: statistics.median(values) for key, values in times.items()}


def measure(name: str, format: Format, pool: Pool, rounds: int) -> list[dict[str, Any]]:
    """Checks and timings of one model, told as they come; returns one entry per pruning and number of rows.

    Raises:
        CheckFailedError: see the checks.
    """
    dense = random_plan(SHAPES[name], format, pool)
    plans = {case: prune(dense, case) if case.sparsity else dense for case in CASES}
    contenders = {case: Contender(plan, pool) for case, plan in plans.items()}
    reader = Reader(pool, dense.bytes_per_forward)
    reader.read(repeats=7)
    say(f"{name} {format}: memory is read at {reader.bytes_per_s / 1e9:.1f} GB/s")
    for case, plan in plans.items():
        error, rows = check_linears(plan, pool), check_rows(contenders[case].model)
        say(f"  {case!s:>9} checked: linears within {error:.1e} of the reference, {rows} rows as alone")
    times = time_all(contenders, reader, rounds)
    bandwidth = reader.bytes_per_s
    say(f"  ceilings at {bandwidth / 1e9:.1f} GB/s, the best of all rounds")
    say(
        f"  {'sparsity':>9} {'rows':>4} {'linears':>9} {'ceiling':>9} {'share':>6} {'step':>9} {'to dense':>8}"
    )
    return [_entry(case, rows, contenders[case], times, bandwidth) for rows in ROWS for case in CASES]


def _entry(
    case: Pruned, rows: int, contender: Contender, times: dict[Any, float], bandwidth: float
) -> dict[str, Any]:
    """Print and return the figures of one pruning and number of rows."""
    linears, step = times["linears", case, rows], times["step", case, rows]
    ceiling = contender.linear_bytes / bandwidth * 1e3
    ratio = times["step", CASES[0], rows] / step
    say(
        f"  {case!s:>9} {rows:4} {linears:6.2f} ms {ceiling:6.2f} ms {ceiling / linears:6.0%} {step:6.2f} ms"
        f" {ratio:7.2f}x"
    )
    return {
        "sparsity": case.sparsity,
        "pattern": str(case.pattern),
        "rows": rows,
        "linears_ms": round(linears, 3),
        "linears_bytes": contender.linear_bytes,
        "linears_ceiling_ms": round(ceiling, 3),
        "linears_share": round(ceiling / linears, 3),
        "step_ms": round(step, 3),
        "step_bytes": contender.step_bytes,
        "step_over_dense": round(ratio, 3),
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sparse_step", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m", help="shapes to run")
    parser.add_argument("--format", choices=get_args(Format), default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds; medians are shown")
    parser.add_argument("--quick", action="store_true", help="3 rounds only")
    parser.add_argument(
        "--out", type=Path, help="result file; default: one of today in the checkout's results"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the bench; returns the exit code."""
    chosen = _arguments(argv)
    rounds = 3 if chosen.quick else chosen.rounds
    try:
        pool = Pool(chosen.threads)
        entries = measure(chosen.model, chosen.format, pool, rounds)
    except (CheckFailedError, KernelsMissing, OSError) as error:
        sys.stderr.write(f"sparse_step: {error}\n")
        return 1
    results = {"model": chosen.model, "format": chosen.format, "entries": entries}
    store(described("sparse_step", pool, rounds, **results), chosen.out, chosen.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
