"""What every bench of this folder does with its results: print them as they come, and store a record of the run."""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline.kernels.cpu.library import Pool

#: Committed results; used if a bench is run from a checkout.
RESULTS = Path("kernels/bench/results")


class CheckFailedError(AssertionError):
    """The kernels computed something else than they should have; nothing is timed then."""


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def times_ms(step: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each of ``count`` runs."""
    found = []
    for _ in range(count):
        started_s = time.perf_counter()
        step()
        found.append((time.perf_counter() - started_s) * 1e3)
    return found


def cpu_model() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def described(bench: str, pool: Pool, rounds: int, **results: Any) -> dict[str, Any]:
    """A record: the bench, the machine, the versions, then the results."""
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": pool.threads, "isa": pool.isa}
    return {
        "bench": bench,
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **results,
    }


def store(record: dict[str, Any], out: Path | None, quick: bool) -> None:
    """Write the record where it was asked for, else into the checkout's results, if this is one; then print it."""
    if out is not None or RESULTS.is_dir():
        name = record["bench"].replace("_", "-")
        path = out or RESULTS / f"{record['date']}-{name}{'-quick' if quick else ''}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        say(f"stored in {path}")
    say(json.dumps(record))
