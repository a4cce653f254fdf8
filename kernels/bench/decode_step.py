"""One forward of a decoder beside the bandwidth ceiling: ``python -m paceline.kernels.bench.decode_step``.

Prints the ceiling first, then checks results (linears against the reference; rows in a batch bit for bit against the
same rows alone), then times forwards of several shapes of batch in alternating rounds, and prints one JSON line last.
Weights are random in the shapes of real models. Exit codes: 0 done, 1 a check failed or the kernels are missing.
"""

import argparse
import os
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from paceline.kernels import reference
from paceline.kernels.bench.ceiling import Reader
from paceline.kernels.bench.record import RESULTS, CheckFailedError, described, say, store, times_ms
from paceline.kernels.bench.shapes import SHAPES, executor, random_plan
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import KernelsMissing, Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import Format

CONTEXT_TOKENS = 100
PREFILL_TOKENS = 1000
PREFILL_CHUNK = 512
_BLOCKS_EACH = 64
#: Runs of a quick case in a row; memory is read one time more, as a warm cache may be what a case finds.
_PER_TURN = 5
#: fp32 sums in another order than the reference's, over up to 8,960 inputs.
_TOLERANCE = 2e-4


@dataclass(frozen=True, slots=True)
class Case:
    """A batch to time: ``sequences`` of ``rows`` tokens each on top of ``CONTEXT_TOKENS``, or one long prefill."""

    name: str
    sequences: int
    rows: int
    prefill: bool = False

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return self.sequences * self.rows


CASES = (
    Case("decode 1x1", 1, 1),
    Case("verify 1x5", 1, 5),
    Case("decode 8x1", 8, 1),
    Case("decode 16x1", 16, 1),
    Case("prefill", 1, PREFILL_TOKENS, prefill=True),
)


def _table(sequence: int) -> list[int]:
    """Block numbers of a sequence."""
    return list(range(sequence * _BLOCKS_EACH, (sequence + 1) * _BLOCKS_EACH))


def run_case(model: Executor, case: Case) -> None:
    """One step of a case; a prefill goes in chunks, as the engine's do, with logits at the end only."""
    if case.prefill:
        for start in range(0, case.rows, PREFILL_CHUNK):
            count = min(PREFILL_CHUNK, case.rows - start)
            wanted = [count - 1] if start + count == case.rows else []
            tokens = [300 + (start + i) % 1000 for i in range(count)]
            model.forward(tokens, [(0, count, start, _table(0))], wanted)
        return
    spans = [(i * case.rows, case.rows, CONTEXT_TOKENS, _table(i)) for i in range(case.sequences)]
    model.forward([300] * case.tokens, spans, list(range(case.tokens)))


def check_linears(plan: DecoderPlan, pool: Pool) -> float:
    """Greatest relative error of a layer's linears against the reference, for 1, 5 and 33 rows.

    Raises:
        CheckFailedError: above the tolerance.
    """
    layer, worst = plan.layers[0], 0.0
    for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
        x = torch.randn(33, linear.in_features)
        expected = reference.linear(x, linear)
        for rows in (1, 5, 33):
            got = pool.linear(x[:rows], linear)
            error = ((got - expected[:rows]).abs().max() / expected.abs().max()).item()
            if not error < _TOLERANCE:
                size = f"{linear.out_features} x {linear.in_features}, {rows} rows"
                raise CheckFailedError(f"{linear.format} {size}: off by {error:.1e} from the reference")
            worst = max(worst, error)
    return worst


def check_rows(model: Executor) -> int:
    """Compare every row of a ragged batch with the same row computed one token at a time, bit for bit.

    Raises:
        CheckFailedError: a row depends on its company.
    """
    lengths = (1, 5, 18, 33)
    tokens = [[(7 * i + 13 * s) % 1000 for i in range(n)] for s, n in enumerate(lengths)]
    alone = [
        model.forward([token], [(0, 1, at, _table(s))], [0])
        for s, sequence in enumerate(tokens)
        for at, token in enumerate(sequence)
    ]
    firsts = [sum(lengths[:s]) for s in range(len(lengths))]
    spans = [(firsts[s], n, 0, _table(s + len(lengths))) for s, n in enumerate(lengths)]
    together = model.forward([t for sequence in tokens for t in sequence], spans, list(range(sum(lengths))))
    differing = (together != torch.cat(alone)).any(-1)
    if differing.any() or together.std() == 0:
        raise CheckFailedError(f"{int(differing.sum())} of {len(differing)} rows depend on the batch")
    return len(differing)


def time_cases(model: Executor, reader: Reader, rounds: int) -> dict[str, float]:
    """Median milliseconds of each case, measured in turn in every round; quick ones several times per turn.

    The ceiling is read again in each round: a machine that speeds up must not end up above it.
    """
    times: dict[str, list[float]] = {case.name: [] for case in CASES}
    for case in CASES:
        run_case(model, case)  # warms caches up and touches the KV blocks
    for _ in range(rounds):
        reader.read(repeats=_PER_TURN + 1)
        for case in CASES:
            times[case.name] += times_ms(partial(run_case, model, case), 1 if case.prefill else _PER_TURN)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, format: Format, pool: Pool, rounds: int) -> dict[str, Any]:
    """Ceiling, checks and timings of one model, told as they come; returns the record.

    Raises:
        CheckFailedError: see the checks.
    """
    plan = random_plan(SHAPES[name], format, pool)
    size = plan.bytes_per_forward
    reader = Reader(pool, size)
    reader.read(repeats=7)
    say(f"{name} {format}: {size / 1e6:.0f} MB per forward at {reader.bytes_per_s / 1e9:.1f} GB/s")
    say(f"  {'ceiling':12} {size / reader.bytes_per_s * 1e3:9.2f} ms")
    model = executor(plan, pool, blocks=16 * _BLOCKS_EACH)
    error, rows = check_linears(plan, pool), check_rows(model)
    say(f"  checked: linears within {error:.1e} of the reference; {rows} rows bit for bit as alone")
    times = time_cases(model, reader, rounds)
    ceiling_ms = size / reader.bytes_per_s * 1e3
    say(f"  {'ceiling':12} {ceiling_ms:9.2f} ms, the best of all rounds")
    steps = [_step(case, times[case.name], ceiling_ms) for case in CASES]
    verify = times["verify 1x5"] / times["decode 1x1"]
    say(f"  five rows cost {verify:.2f} times one row")
    return {
        "model": name,
        "format": format,
        "bytes_per_forward": size,
        "read_gb_s": round(reader.bytes_per_s / 1e9, 2),
        "ceiling_ms": round(ceiling_ms, 3),
        "linear_error": error,
        "steps": steps,
        "verify5_over_1": round(verify, 3),
    }


def _step(case: Case, ms: float, ceiling_ms: float) -> dict[str, Any]:
    """Print and return one case's figures; a prefill reads the weights several times, so it has no share."""
    share = None if case.prefill else round(ceiling_ms / ms, 3)
    shown = "" if share is None else f"   {share:4.0%} of the ceiling"
    tok_s = case.tokens / ms * 1e3
    say(f"  {case.name:12} {ms:9.2f} ms {tok_s:9.0f} tok/s{shown}")
    return {
        "case": case.name,
        "tokens": case.tokens,
        "ms": round(ms, 3),
        "tok_s": round(tok_s, 1),
        "share_of_ceiling": share,
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="decode_step", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all", help="shapes to run")
    parser.add_argument("--format", choices=get_args(Format), default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds; medians are shown")
    parser.add_argument("--quick", action="store_true", help="SmolLM2's shapes and 3 rounds only")
    parser.add_argument("--out", type=Path, help=f"result file; default: {RESULTS}/DATE-decode-step.json")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the bench; returns the exit code."""
    chosen = _arguments(argv)
    names = ["smollm2-135m"] if chosen.quick else list(SHAPES) if chosen.model == "all" else [chosen.model]
    rounds = 3 if chosen.quick else chosen.rounds
    try:
        pool = Pool(chosen.threads)
        models = [measure(name, chosen.format, pool, rounds) for name in names]
    except (CheckFailedError, KernelsMissing, OSError) as error:
        sys.stderr.write(f"decode_step: {error}\n")
        return 1
    store(described("decode_step", pool, rounds, models=models), chosen.out, chosen.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
