"""``python -m paceline.kernels.gpu.report``: what can be known of the GPU kernels without a GPU, held to thresholds.

Compiles every kernel for every target and reads registers, spills and shared memory from the machine code; counts the
bytes that sparse products load per weight. Fails (exit code 1) if a kernel spills, if it loads over 1.1 times what its
format needs, or if a compiler no longer makes one instruction of ``popcount``. Each part runs in a process of its own,
because triton either compiles or interprets.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MAX_SPILLS = 0
MAX_OVER_CEILING = 1.10
_SPARSE_KERNELS = ("gemv_kernel", "gemm_kernel", "expand_kernel")


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured: rows of ``usage.Usage`` and ``sectors.Traffic``."""

    usage: Sequence[Mapping[str, Any]]
    traffic: Sequence[Mapping[str, Any]]

    def failures(self) -> list[str]:
        """What is beyond its threshold, in words."""
        return [*_usage_failures(self.usage), *_traffic_failures(self.traffic)]


def _usage_failures(usage: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in usage:
        name = f"{row['kernel']} on {row['target']}"
        if row["spills"] > MAX_SPILLS:
            yield f"{name}: {row['spills']} spills"
        if row["kernel"].startswith(_SPARSE_KERNELS) and not row["popcounts"]:
            yield f"{name}: popcount is not one instruction"
    for target in TARGETS:
        if not any(row["target"] == target for row in usage):
            yield f"nothing was compiled for {target}"


def _traffic_failures(traffic: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in traffic:
        ratio = row["bytes_per_weight"] / row["ceiling"]
        if ratio > MAX_OVER_CEILING:
            name = f"{row['kernel']} {row['format']} {row['shape']}"
            yield f"{name}: loads {ratio:.2f} times what the format needs, allowed are {MAX_OVER_CEILING}"
    if not traffic:
        yield "no loads were counted"


def collect() -> Report:
    """Compile and count, as many processes at a time as there are cores.

    Raises:
        CalledProcessError: a kernel does not compile or run; what triton says is on standard error.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.submit(_run, "sectors", interprets=True)
        compiled = [pool.submit(_run, "usage", target, interprets=False) for target in TARGETS]
        return Report([row for part in compiled for row in part.result()], counted.result())


def _run(module: str, *arguments: str, interprets: bool) -> list[dict[str, Any]]:
    """What a module of this package prints, its process compiling or interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interprets:
        env["TRITON_INTERPRET"] = "1"
    # Kernels say themselves whether sums are fused; triton would warn that its default will change.
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    command = [sys.executable, "-m", f"paceline.kernels.gpu.{module}", *arguments]
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def lines(report: Report) -> Iterator[str]:
    """For people: a line per kernel, targets side by side, then the bytes per weight."""
    yield "registers / spills / shared bytes / 16-byte loads / popcounts"
    yield f"{'':44}" + "".join(f"{target:>26}" for target in TARGETS)
    cells = {(row["kernel"], row["target"]): row for row in report.usage}
    for kernel in dict.fromkeys(row["kernel"] for row in report.usage):
        yield f"{kernel:44}" + "".join(f"{_cell(cells.get((kernel, target))):>26}" for target in TARGETS)
    yield ""
    yield "bytes loaded per weight, in sectors of 32 bytes"
    yield f"{'':36}{'loaded':>10}{'ceiling':>10}{'ratio':>8}{'x':>8}"
    for row in report.traffic:
        name = f"{row['kernel']} {row['format']} {row['shape']}"
        ratio = row["bytes_per_weight"] / row["ceiling"]
        numbers = f"{row['bytes_per_weight']:10.4f}{row['ceiling']:10.4f}{ratio:8.3f}"
        yield f"{name:36}{numbers}{row['x_bytes_per_weight']:8.3f}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    keys = ("registers", "spills", "shared_bytes", "wide_loads", "popcounts")
    return " / ".join(str(row[key]) for key in keys)


def main() -> int:
    """Print the table, one JSON line, and what failed; 1 if anything did."""
    report = collect()
    failures = report.failures()
    text = [*lines(report), ""]
    told = {"usage": report.usage, "traffic": report.traffic, "failures": failures}
    text += [json.dumps(told), *(f"FAILED {failure}" for failure in failures)]
    text.append("no GPU was used: nothing here says how fast the kernels are")
    sys.stdout.write("\n".join(text) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
