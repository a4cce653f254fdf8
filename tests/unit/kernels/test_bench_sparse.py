"""The sparse benches on small shapes: they check before they time, and their records hold what they say."""

import json
from pathlib import Path

import pytest
import torch
from native_kernels import require_native

from paceline.kernels import reference
from paceline.kernels.bench import sparse_linears, sparse_step
from paceline.kernels.bench.shapes import Shape, random_plan
from paceline.kernels.bench.sparse_shapes import Pruned, blocks_of, prune, random_linear, weight_bytes
from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import Pattern

SMALL = Shape(2, 128, 192, 4, 2, 32, 1400, qkv_bias=True)


@pytest.fixture
def pool() -> Pool:
    require_native("portable")
    return Pool(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes, and no memory to speak of."""
    monkeypatch.setattr(sparse_step, "SHAPES", {"smollm2-135m": SMALL})
    monkeypatch.setattr(sparse_linears, "LINEARS", {"smollm2-135m": ((600, 128), (40, 64))})
    monkeypatch.setattr(sparse_linears, "_SPREAD_BYTES", 1 << 16)
    monkeypatch.setattr(sparse_linears, "_READ_BYTES", 1 << 20)


def test_a_pruned_plan_reads_as_many_bytes_as_its_sparsity_leaves(pool: Pool) -> None:
    dense = random_plan(SMALL, "int8", pool)
    sparse = prune(dense, Pruned(0.75))
    share = weight_bytes(blocks_of(sparse)) / weight_bytes(blocks_of(dense))
    assert share == pytest.approx(0.25 + 1 / 8, abs=0.01)
    assert sparse.layers[0].qkv.bias is not None
    assert sparse.head.tile_starts is None


@pytest.mark.parametrize("pruned", [Pruned(0.0), Pruned(0.5), Pruned(0.75, Pattern(16, 64))])
@pytest.mark.parametrize("out", [40, 256, 600])
def test_repeated_rows_are_a_layer_like_any_other(pool: Pool, pruned: Pruned, out: int) -> None:
    linear = random_linear(out, 128, pruned, "int8", pool)
    x = torch.randn(3, 128)
    assert linear.out_features == out
    assert torch.allclose(pool.linear(x, linear), reference.linear(x, linear), rtol=1e-4, atol=1e-4)
    if out > 256:
        assert torch.equal(linear.unpack()[256], linear.unpack()[0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bench", [sparse_step, sparse_linears])
def test_the_record_holds_every_cell(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert bench.main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    expected = 4 * 3 if bench is sparse_step else 2 * 7 * 5
    assert len(record["entries"]) == expected
    assert {(e["sparsity"], e["pattern"]) for e in record["entries"]} == {
        (case.sparsity, str(case.pattern)) for case in bench.CASES
    }


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bench", [sparse_step, sparse_linears])
def test_wrong_results_are_not_timed(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = reference.linear
    monkeypatch.setattr(reference, "linear", lambda x, layer: right(x, layer) * 1.001)
    assert bench.main(["--quick", "--threads", "1", "--out", str(tmp_path / "record.json")]) == 1
    assert "off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
