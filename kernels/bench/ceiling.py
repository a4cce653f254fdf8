"""The roofline: how fast the kernels' own threads read memory, and nothing else.

Reading is all that they do here (``pl_read``), from huge pages as the weights lie in, so no decode step can be faster
than its weight bytes over this figure. Run ``python -m paceline.kernels.bench.ceiling [MIB] [THREADS]``; prints one
JSON line. Exit code 1 with one line on stderr if the kernels are missing.
"""

import json
import os
import sys
import time

from paceline.kernels.cpu.library import KernelsMissing, Pool
from paceline.kernels.cpu.memory import huge_pages

#: Larger than any last-level cache we know of, so that the figure is DRAM's.
DEFAULT_MIB = 1024
_MIB = 1 << 20


class Reader:
    """Reads the same memory again and again, and remembers the best speed.

    Args:
        pool: threads that read.
        size: bytes, taken as whole MiB, at least one.
    """

    def __init__(self, pool: Pool, size: int) -> None:
        self._pool = pool
        # Written, or all pages would be the one of zeros.
        self._buffer = huge_pages(max(size // _MIB, 1) * _MIB).fill_(1)
        self._best_s = float("inf")

    def read(self, repeats: int = 1) -> None:
        """Read everything ``repeats`` times."""
        for _ in range(repeats):
            started_s = time.perf_counter()
            self._pool.read(self._buffer)
            self._best_s = min(self._best_s, time.perf_counter() - started_s)

    @property
    def bytes_per_s(self) -> float:
        """Best speed so far; 0 before the first read."""
        return len(self._buffer) / self._best_s


def main(argv: list[str]) -> int:
    """Measure and print."""
    mib = int(argv[0]) if argv else DEFAULT_MIB
    threads = int(argv[1]) if len(argv) > 1 else os.cpu_count() or 1
    try:
        pool = Pool(threads)
    except (KernelsMissing, OSError) as error:
        sys.stderr.write(f"ceiling: {error}\n")
        return 1
    reader = Reader(pool, mib * _MIB)
    reader.read(repeats=7)
    facts = {"read_gb_s": round(reader.bytes_per_s / 1e9, 2), "mib": mib, "threads": threads, "isa": pool.isa}
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
