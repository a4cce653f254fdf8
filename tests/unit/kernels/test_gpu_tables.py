"""The table that chooses sparse or dense, the command that fills it, and the bench: run by the interpreter."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from triton_kernels import random_sparse

from paceline.kernels import ops
from paceline.kernels.bench import gpu as bench
from paceline.kernels.formats import Pattern, pack_tiles
from paceline.kernels.gpu import runtime, shapes, table, tune
from paceline.kernels.gpu.table import Entry, Launch, TableError

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of the test's own, not there yet."""
    path = tmp_path / "tables" / "own.json"
    monkeypatch.setenv("PACELINE_KERNELS", "triton")
    monkeypatch.setenv("PACELINE_KERNEL_TABLE", str(path))
    table.find.cache_clear()
    yield path
    table.find.cache_clear()


def entry(device: str = "cpu", format: str = "*", shape: str = "*", rows: int = 3, warps: int = 8) -> Entry:
    return Entry(device, format, shape, rows, Launch(warps, 1, 1), Launch(warps, 2, 1))


def test_the_shipped_table_knows_every_device() -> None:
    assert table.find("NVIDIA H100", "bitmask-bf16", "1024x4096").device == "*"
    assert table.find("cpu", "16:32-int8", "64x64").device == "cpu"
    tiles = pack_tiles(random_sparse(40, 64))
    assert table.plan_for(tiles, 1) == table.Plan(True, 4, 1, 1)
    assert not table.plan_for(tiles, 65).is_sparse


def test_inputs_are_split_until_there_are_programs_enough() -> None:
    tiles = pack_tiles(random_sparse(40, 64))  # 3 rows of tiles
    assert [Launch(4, 1, n).plan(tiles).splits for n in (1, 3, 4, 132)] == [1, 1, 2, 44]


def test_the_most_exact_entry_wins_and_the_own_table_among_equals(own: Path) -> None:
    table.write([entry(rows=5), entry(format="bitmask-fp32", rows=6), entry(shape="64x64", rows=7)], own)
    assert table.find("cpu", "bitmask-int8", "8x8").max_sparse_rows == 5
    assert table.find("cpu", "bitmask-int8", "64x64").max_sparse_rows == 7
    assert table.find("cpu", "bitmask-fp32", "64x64").max_sparse_rows == 6
    assert table.find("other", "bitmask-fp32", "64x64").device == "*"


def test_the_number_of_rows_decides_by_the_table(own: Path) -> None:
    tiles = pack_tiles(random_sparse(20, 64))
    table.write([entry(rows=2)], own)
    runtime.forget_launches()
    for rows in (1, 2, 3):
        ops.sparse_linear(torch.randn(rows, 64), tiles)
    assert runtime.launches() == {"gemv_kernel": 1, "gemm_kernel": 1, "expand_kernel": 1}


def test_writing_keeps_what_others_wrote(own: Path) -> None:
    table.write([entry("GPU A"), entry("GPU B")], own)
    table.write([entry("GPU B", rows=9)], own)
    kept = {e["device"]: e["max_sparse_rows"] for e in json.loads(own.read_text())["entries"]}
    assert kept == {"GPU A": 3, "GPU B": 9}
    assert [p.name for p in own.parent.iterdir()] == ["own.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{}]}', '{"entries": [{"device": 1, "gemv": {}}]}'])
def test_a_broken_table_is_one_clear_error(own: Path, text: str) -> None:
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(TableError, match=r"own\.json: not a table of kernels .* run python -m"):
        table.find("cpu", "x", "y")


def test_without_a_word_the_table_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PACELINE_KERNEL_TABLE")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    assert table.own_table() == tmp_path / "kernel-table.json"


def test_tuning_finds_the_fastest_settings_and_where_dense_wins(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CONFIGS", [Launch(2, 1, 1), Launch(4, 3, 2), Launch(8, 2, 1)])
    monkeypatch.setattr(tune, "ROWS", (1, 2, 4))
    monkeypatch.setattr(tune, "_FORMATS", ((Pattern(16, 32), "int8"),))
    timed = []

    def time_ms(call: Callable[[], object]) -> float:
        """By what was launched: gemv quickest with 8 warps, gemm with 4, dense as quick as 2 rows are sparse."""
        assert isinstance(call, partial)
        rows, plan = len(call.args[0]), call.args[3]
        call()
        timed.append((rows, plan))
        if not plan.is_sparse:
            return 10.0
        best = 8 if rows == 1 else 4
        return rows * (3.0 if plan.num_warps == best else 4.0)

    entries = list(tune.tune(CPU, {"small": (40, 64)}, time_ms))
    assert entries == [Entry("cpu", "16:32-int8", "64x64", 2, Launch(8, 2, 1), Launch(4, 3, 2))]
    assert {rows for rows, plan in timed if not plan.is_sparse} == {1, 2, 4}
    table.write(entries, own)
    tiles = shapes.random_tiles((40, 64), Pattern(16, 32), 0.5, "int8", CPU)
    assert table.plan_for(tiles, 1) == table.Plan(True, 8, 2, 1)
    assert not table.plan_for(tiles, 3).is_sparse


def test_without_a_gpu_tuning_and_benching_say_so(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "no CUDA GPU here: nothing to tune, the shipped table stays in use\n"
    assert bench.main() == 0
    assert capsys.readouterr().out == "bench-gpu: no CUDA GPU here, nothing was timed\n"
    assert not own.exists()


def run_once(call: Callable[[], object]) -> float:
    call()
    return 2.0


def test_the_bench_checks_and_times_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", (1, 3))
    monkeypatch.setattr(bench, "_KINDS", bench._KINDS[1:6:2])
    monkeypatch.setattr(bench, "_COPY_BYTES", 1000)
    speed = bench.bandwidth(CPU, run_once)
    assert speed == 2 * 1000 / 0.002
    rows = list(bench.measure(CPU, {"small": (20, 64)}, speed, run_once))
    assert len(rows) == len(bench._KINDS) * len(bench._DTYPES) * 2
    assert rows[0].ceiling_ms > rows[2].ceiling_ms > 0  # bf16 needs more bytes than int8
    assert "T=3" in str(rows[1])
    names = [choosing.name for choosing in bench.measure_choosing(CPU, 50, speed, run_once)]
    assert names == ["combine", "verify by_block=False", "verify by_block=True"]


def test_the_bench_refuses_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = runtime.load("sparse_linear", "cpu")
    right = kernels.sparse_linear
    monkeypatch.setattr(kernels, "sparse_linear", lambda *args: right(*args) * 1.1)
    with pytest.raises(ValueError, match="bitmask-bf16 20x64: a wrong product"):
        next(bench.measure(CPU, {"small": (20, 64)}, 1.0, run_once))
