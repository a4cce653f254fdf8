"""What is known of the GPU kernels without a GPU: they compile, the report's figures are real, its thresholds bite."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from paceline.kernels.formats import Pattern, SparseWeight, pack_tiles
from paceline.kernels.gpu import report, runtime
from paceline.server.errors import ConfigError
from paceline.server.models.loader import kernels_wanted

pytest.importorskip("triton")

GOOD = {
    "kernel": "gemv_kernel x",
    "registers": 40,
    "spills": 0,
    "shared_bytes": 0,
    "wide_loads": 1,
    "popcounts": 3,
}
USAGE = [{**GOOD, "target": target} for target in report.TARGETS]
TRAFFIC = {
    "kernel": "gemv",
    "format": "f",
    "shape": "1x1",
    "bytes_per_weight": 1.09,
    "ceiling": 1.0,
    "x_bytes_per_weight": 0.1,
}


def python(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, whose triton compiles unless told otherwise."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "PACELINE_KERNELS")
    }
    env |= {"TRITON_DEFAULT_FP_FUSION": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_thresholds() -> None:
    assert report.Report(USAGE, [TRAFFIC]).failures() == []
    spilling = [{**USAGE[0], "spills": 1}, *USAGE[1:]]
    assert report.Report(spilling, [TRAFFIC]).failures() == ["gemv_kernel x on sm_80: 1 spills"]
    slow = [{**USAGE[0], "popcounts": 0}, *USAGE[1:]]
    assert report.Report(slow, [TRAFFIC]).failures() == [
        "gemv_kernel x on sm_80: popcount is not one instruction"
    ]
    assert report.Report(USAGE[:3], [TRAFFIC]).failures() == ["nothing was compiled for gfx942"]
    wasteful = [{**TRAFFIC, "bytes_per_weight": 1.11}]
    assert report.Report(USAGE, wasteful).failures() == [
        "gemv f 1x1: loads 1.11 times what the format needs, allowed are 1.1"
    ]
    assert report.Report(USAGE, []).failures() == ["no loads were counted"]


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (2, 1)])
def test_the_command_prints_a_table_and_json_and_fails_where_it_should(
    spills: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "spills": spills} for row in USAGE]
    monkeypatch.setattr(report, "collect", lambda: report.Report(rows, [TRAFFIC]))
    assert report.main() == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split("/")[1].strip() == str(spills)
    told = json.loads(next(line for line in printed if line.startswith("{")))
    assert len(told["failures"]) == spills * 2
    assert sum(line.startswith("FAILED") for line in printed) == spills * 2


#: One kernel of each file, and one that is known to spill: ``make report-gpu`` compiles all of them.
_COMPILE = """
import json
from dataclasses import asdict
from paceline.kernels.gpu import aot, usage
names = ("gemv_kernel 16:32 int8", "gemm_kernel bitmask 50% bf16", "perturb_kernel", "draw_kernel")
some = [variant for variant in aot.variants() if variant.name in names]
spilling = aot._gemm("spilling", "bf16", 1024, 16, block=64)
spilling.options["num_warps"] = 4
rows = []
for target, chosen in (("sm_90", [*some, spilling]), ("gfx942", some)):
    usage.variants = lambda: chosen
    rows += [asdict(row) for row in usage.usages([target])]
print(json.dumps(rows))
"""


def test_kernels_compile_for_both_vendors_without_a_gpu_and_spills_are_counted() -> None:
    rows: list[dict[str, Any]] = json.loads(python(_COMPILE))
    assert [row["target"] for row in rows] == ["sm_90"] * 5 + ["gfx942"] * 4
    spilling = rows.pop(4)
    assert spilling["kernel"].endswith("spilling")
    assert spilling["spills"] > 0
    for row in rows:
        assert row["registers"] > 0
        assert row["spills"] == 0, row
        assert (row["popcounts"] > 0) == row["kernel"].startswith(report._SPARSE_KERNELS), row
    assert all(row["shared_bytes"] > 0 and row["wide_loads"] > 0 for row in rows if "gemm" in row["kernel"])


def test_the_bytes_of_a_format_are_counted_from_its_loads() -> None:
    sectors = runtime.load("sectors", "cpu")
    generator = torch.Generator().manual_seed(0)
    tiles = pack_tiles(sectors.random_weight(576, Pattern(16, 32), 0.5, torch.bfloat16, generator))
    exact = sectors.measure(tiles, 1, "50%")
    assert (exact.kernel, exact.shape) == ("gemv", "32x576")
    assert exact.bytes_per_weight == pytest.approx(16 / 32 * 2 + 1 / 8)  # nothing wasted at all
    assert exact.ceiling == exact.bytes_per_weight
    # One value in a tile costs a whole sector: far from what the format needs.
    lonely = torch.zeros(32, 576, dtype=torch.bfloat16)
    lonely[::16, ::64] = 1
    wasteful = sectors.measure(pack_tiles(SparseWeight.from_dense(lonely)), 3, "99%")
    assert wasteful.kernel == "gemm"
    assert wasteful.ratio > report.MAX_OVER_CEILING


_LAZY = """
import sys, torch
from paceline.kernels import ops
from paceline.kernels.formats import SparseWeight, pack_tiles
import paceline.server.engine.kernel_runner
assert "triton" not in sys.modules
tiles = pack_tiles(SparseWeight.from_dense(torch.eye(3)))
print(ops.sparse_linear(torch.ones(1, 3), tiles).tolist(), "triton.language" in sys.modules)
"""


def test_triton_is_imported_when_it_is_needed_and_interprets_without_being_told() -> None:
    assert python(_LAZY, PACELINE_KERNELS="triton") == "[[1.0, 1.0, 1.0]] True\n"


_LATE = """
import triton, torch
from paceline.kernels.gpu import runtime
from paceline.kernels import dispatch
print(runtime.missing("cpu"))
print(dispatch.choose("verify", "fp32", "cpu").words)
"""


def test_a_triton_that_compiles_already_is_refused_in_words() -> None:
    lines = python(_LATE, PACELINE_KERNELS="triton").splitlines()
    assert lines[0].endswith("set TRITON_INTERPRET=1 in the environment of the process")
    assert lines[1] == f"none (PACELINE_KERNELS is triton, but {lines[0]})"


def test_a_server_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_installed", lambda: False)
    monkeypatch.setenv("PACELINE_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"^PACELINE_KERNELS is triton, but triton is not installed"):
        kernels_wanted("cpu")
    monkeypatch.setenv("PACELINE_KERNELS", "torch")
    assert not kernels_wanted("cpu")
