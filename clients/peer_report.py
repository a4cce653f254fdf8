"""What the side-by-side bench found out, about the machine and about the contenders, and how it is shown.

Owns all figures, the ratios, the share of the roofline reached, the table and the JSON rows.
It must not know how contenders are run. Ratios pair the figures of one round; the median over rounds is shown.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from paceline.clients.stats import LevelStats


def cpu_model() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of everything that is compared; a missing package says so."""
    found = {"python": platform.python_version()}
    for package in ("paceline", "torch", "transformers", "xllamacpp"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def busy_share(seconds: float = 1.0) -> float | None:
    """Share of all processor time used by anyone during ``seconds``; None where the kernel does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> tuple[int, int]:
        counts = [int(word) for word in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return sum(counts), counts[3] + counts[4]  # idle, and waiting for disks

    all_before, idle_before = ticks()
    time.sleep(seconds)
    all_after, idle_after = ticks()
    return round(1 - (idle_after - idle_before) / max(1, all_after - all_before), 3)


@dataclass(slots=True)
class Board:
    """Figures by (contender, level), one entry per round.

    Attributes:
        ceilings_tok_s: tokens/s that one stream without speculation cannot exceed, by contender.
        skipped: who did not take part, or no longer, and why.
        busy_share: of the processors, taken by others while all contenders were paused.
    """

    figures: dict[tuple[str, str], list[LevelStats]] = field(default_factory=dict)
    ceilings_tok_s: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    busy_share: float | None = None

    def add(self, name: str, stats: LevelStats) -> None:
        """Note one round of one contender at one level."""
        self.figures.setdefault((name, stats.level), []).append(stats)

    def median(self, name: str, level: str, figure: Callable[[LevelStats], float | None]) -> float | None:
        """Median over the rounds; None if nothing was measured."""
        values = [value for stats in self.figures[name, level] if (value := figure(stats)) is not None]
        return round(statistics.median(values), 2) if values else None

    def ratio(self, ours: str, peer: str, level: str) -> float | None:
        """Median over rounds of our tokens/s over the peer's; None where one of them has no figures."""
        pairs = zip(self.figures.get((ours, level), []), self.figures.get((peer, level), []), strict=False)
        ratios = [mine.output_tok_s / its.output_tok_s for mine, its in pairs if its.output_tok_s]
        return round(statistics.median(ratios), 3) if ratios else None

    def rows(self, ours: Sequence[str]) -> list[dict[str, Any]]:
        """One record per contender and level, as the table and the JSON line show it."""
        return [self._row(name, level, ours) for name, level in self.figures]

    def _row(self, name: str, level: str, ours: Sequence[str]) -> dict[str, Any]:
        rounds = self.figures[name, level]
        tok_s = self.median(name, level, lambda stats: stats.output_tok_s)
        ceiling = self.ceilings_tok_s.get(name) if level == "1" else None
        ratios = {our: self.ratio(our, name, level) for our in ours if name not in ours}
        return {
            "contender": name,
            "concurrency": int(level),
            "output_tok_s": tok_s,
            "output_tok_s_rounds": [stats.output_tok_s for stats in rounds],
            "ttft_ms_p50": self.median(name, level, lambda stats: stats.ttft_ms.p50),
            "itl_ms_p50": self.median(name, level, lambda stats: stats.itl_ms.p50),
            "errors": sum(stats.errors for stats in rounds),
            "ceiling_tok_s": ceiling and round(ceiling, 1),
            "share_of_ceiling": round(tok_s / ceiling, 3) if tok_s and ceiling else None,
            "ours_over_it": {our: ratio for our, ratio in ratios.items() if ratio is not None},
        }


def _cell(value: float | None, pattern: str = "{:.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def table(rows: Sequence[Mapping[str, Any]], ours: Sequence[str]) -> Table:
    """The human-readable report, best tokens/s first within a concurrency."""
    shown = Table(
        title="Medians over the rounds", caption="share: of the bandwidth ceiling without speculation"
    )
    for name in ("streams", "contender", "tok/s", "TTFT ms", "inter-token ms", "share", "errors"):
        shown.add_column(name, justify="left" if name == "contender" else "right")
    for our in ours:
        shown.add_column(f"{our} / it", justify="right")
    for row in sorted(rows, key=lambda row: (row["concurrency"], -(row["output_tok_s"] or 0))):
        speeds = (_cell(row["output_tok_s"]), _cell(row["ttft_ms_p50"]), _cell(row["itl_ms_p50"], "{:.2f}"))
        share = _cell(row["share_of_ceiling"], "{:.0%}")
        ratios = (_cell(row["ours_over_it"].get(our), "{:.2f}x") for our in ours)
        shown.add_row(str(row["concurrency"]), row["contender"], *speeds, share, str(row["errors"]), *ratios)
    return shown
