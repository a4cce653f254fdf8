"""Facts about this machine and this environment that a bench report needs: processor, versions, how busy it is.

Owns nothing else; it must not know contenders or figures.
"""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cpu_model() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of everything that is compared in this environment; a missing package says so."""
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
