"""What compiled kernels take of a GPU: registers, spills, shared memory; and what compilers made of two idioms.

Read from the cubin with the tools in Triton's wheel, from the assembly for AMD. Spills are instructions that store to
or load from local memory, counted in the machine code: ptxas calls only some of them spills. Run as a module, for
targets on the command line, it prints JSON; its process must be one whose triton compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from paceline.kernels.gpu.aot import TARGETS, compile_for, variants


@dataclass(frozen=True, slots=True)
class Usage:
    """One kernel on one target.

    Attributes:
        registers: per thread.
        spills: instructions on local memory (NVIDIA), spilled registers (AMD).
        shared_bytes: per program.
        wide_loads: 16-byte loads from memory.
        popcounts: instructions that count bits.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    wide_loads: int
    popcounts: int


def usages(targets: Sequence[str]) -> Iterator[Usage]:
    """Compile and read every variant for every target."""
    for target in targets:
        for variant in variants():
            compiled = compile_for(variant, target)
            read = _of_cubin if "cubin" in compiled.asm else _of_assembly
            yield Usage(variant.name, target, shared_bytes=compiled.metadata.shared, **read(compiled))


def _of_cubin(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    return {
        "registers": _number(r"REG:(\d+)", resources),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.\S*\.128\b", code)),
        "popcounts": len(re.findall(r"\bU?POPC\b", code)),
    }


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _of_assembly(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", code),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", code)
        + _number(r"\.sgpr_spill_count:\s*(\d+)", code),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "popcounts": len(re.findall(r"\b[vs]_bcnt", code)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in what was compiled")
    return int(found[1])


if __name__ == "__main__":
    json.dump([asdict(usage) for usage in usages(sys.argv[1:] or list(TARGETS))], sys.stdout)
