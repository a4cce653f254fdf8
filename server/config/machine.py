"""What this machine offers, asked only when it matters: CUDA, bf16 arithmetic on the CPU, physical cores.

torch is imported only by ``cuda_available``. Linux tells the rest through ``/proc`` and ``/sys``; elsewhere
the answers fall back to what the standard library knows.
"""

import os
from functools import cached_property
from pathlib import Path

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


class Machine:
    """Facts about the machine, each looked up once."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    @cached_property
    def cuda_available(self) -> bool:
        """Whether torch sees a CUDA device."""
        import torch

        return torch.cuda.is_available()

    @cached_property
    def cpu_flags(self) -> frozenset[str]:
        """Instruction-set flags of the first CPU; empty where the system does not list them."""
        lines = _read(self._root / "proc/cpuinfo").splitlines()
        listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        return frozenset(listed.partition(":")[2].split())

    @property
    def cpu_computes_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 natively; without it bf16 is slower than fp32."""
        return bool(_BF16_FLAGS & self.cpu_flags)

    @cached_property
    def usable_cores(self) -> int:
        """Physical cores that this process may use: its CPU affinity, cut by a container's CPU quota."""
        cores = len({self._core(cpu) for cpu in _affinity()})
        quota = self._cpu_quota
        return cores if quota is None else max(1, min(cores, quota))

    @cached_property
    def _cpu_quota(self) -> int | None:
        """Whole CPUs that the control group (version 2) grants, if it sets a limit."""
        words = _read(self._root / "sys/fs/cgroup/cpu.max").split()
        if len(words) != 2 or not all(word.isdigit() for word in words):
            return None
        return -(-int(words[0]) // int(words[1]))

    def _core(self, cpu: int) -> tuple[str, str]:
        """(package, core) of a logical CPU; the CPU itself where the system does not say."""
        topology = self._root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
        return (package.strip(), core.strip()) if core else ("cpu", str(cpu))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
