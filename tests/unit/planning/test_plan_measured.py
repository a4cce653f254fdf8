"""What is made of timed forwards, and that a machine is measured through the kernels; no test here asserts a time."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_kernels import require_native
from tiny import tiny_hf_config

from paceline.kernels.cpu.library import KernelsMissing, Pool
from paceline.server.errors import ConfigError
from paceline.server.models.config import parse_model_config
from paceline.server.planning import check, measured
from paceline.server.planning.measured import BATCHES, Point, fit, measure, split
from paceline.server.planning.roofline import Overheads, p_norm

BYTES, FLOPS = 1.35e8, 2.7e8


@given(st.floats(1e9, 1e11), st.floats(1e10, 1e12), st.sampled_from((1.0, 1.5, 2.0, 3.0)))
def test_a_fit_finds_the_machine_that_made_the_times(bandwidth: float, flops: float, p: float) -> None:
    points = [Point(BYTES, n * FLOPS, p_norm(BYTES / bandwidth, n * FLOPS / flops, p)) for n in BATCHES]
    found = fit(points)
    assert found.error < 1e-3
    for point in points:
        again = p_norm(point.bytes / found.bandwidth, point.flops / found.flops, found.overlap)
        assert again == pytest.approx(point.seconds, rel=2e-3)


def test_a_fit_of_noise_stays_positive_and_says_how_far_off_it_is() -> None:
    found = fit(
        [Point(BYTES, n * FLOPS, seconds) for n, seconds in zip((1, 2, 4), (3.0, 2.0, 1.0), strict=True)]
    )
    assert found.bandwidth > 0
    assert found.flops > 0
    assert found.error > 0.3


@given(st.floats(1e-9, 1e-3), st.floats(1e-9, 1e-3), st.integers(2, 128), st.floats(1, 4))
def test_reading_and_computing_are_told_apart(read: float, compute: float, rows: int, p: float) -> None:
    apart, together = p_norm(read, compute, p), p_norm(read / rows, compute, p)
    found = split(apart, together, rows, p)
    assert p_norm(*found, p) == pytest.approx(apart, rel=1e-3)
    if 0.1 < read / compute < 10:
        assert found == pytest.approx((read, compute), rel=0.02)


def test_noise_that_makes_sharing_dearer_leaves_reading_at_nothing() -> None:
    read, compute = split(1.0, 1.2, 64, 1.0)
    assert read < 1e-3
    assert compute == pytest.approx(1.2, rel=1e-3)


def config(**overrides: Any) -> Any:
    return parse_model_config(tiny_hf_config("qwen2", **overrides))


@pytest.mark.parametrize(("format", "sparsity"), [("int8", 0.0), ("int8", 0.5), ("bf16", 0.0), ("fp32", 0.5)])
def test_this_machine_is_measured(format: Any, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    monkeypatch.setattr(measured, "_ROUNDS", 1)
    rates = measure(config(), format, sparsity, 1)
    machine = rates.machine(1e9, Overheads(step=1.0))
    for rate in (
        rates.ceiling,
        rates.bandwidth,
        rates.kv_bandwidth,
        rates.linear_flops,
        rates.attention_flops,
    ):
        assert rate > 0
    assert machine.bandwidth == rates.bandwidth
    assert machine.overlap == rates.overlap >= 1.0
    assert machine.overheads.step == 1.0


def test_a_probe_has_the_models_layers_and_bounds_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    pool = Pool(1)
    whole = measured._probe(config(num_hidden_layers=4, vocab_size=4096), "int8", 0.0, pool)
    assert (len(whole.layers), whole.vocab, whole.hidden, whole.ffn) == (4, 4096, 64, 96)
    assert whole.layers[0].qkv.bias is not None
    sparse = measured._probe(config(), "int8", 0.5, pool)
    assert sparse.layers[1].down.tile_starts is not None
    assert sparse.head.tile_starts is None
    size = sum(linear.num_bytes for linear in whole.linears[:4])
    monkeypatch.setattr(measured, "_MOST_BYTES", 2 * size)
    cut = measured._probe(config(num_hidden_layers=4, vocab_size=4096), "int8", 0.0, pool)
    assert (len(cut.layers), cut.vocab) == (2, 2048)


def test_without_kernels_the_rates_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(threads: int) -> None:
        raise KernelsMissing("no compiler was there")

    monkeypatch.setattr(measured, "Pool", missing)
    with pytest.raises(ConfigError, match="no compiler was there; give --bandwidth-gbs and --tflops instead"):
        measure(config(), "int8", 0.0, 1)


def test_the_check_runs_a_model_and_its_draft_and_keeps_a_record(
    tiny_checkpoint: Any, own_cache: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The target as its own draft: everything is accepted, so that blocks of 2 and 4 give 3 and 5 tokens."""
    require_native()
    monkeypatch.setattr(measured, "_ROUNDS", 1)
    monkeypatch.setattr(check, "BATCHES", (1, 3))
    monkeypatch.setattr(check, "PREFILL_TOKENS", 200)
    folder, out = str(tiny_checkpoint("llama")), tmp_path / "record.json"
    arguments = ["--model", folder, "--draft", folder, "--threads", "1", "--quick", "--out", str(out)]
    assert check.main(arguments) == 0
    record = json.loads(out.read_text())
    entries = {entry["case"]: entry for entry in record["entries"]}
    assert list(entries) == ["rates", "1 x 1", "3 x 1", "1 x 3", "3 x 3", "1 x 5", "3 x 5", "prefill"]
    for case, tokens in (("1 x 1", 1), ("3 x 1", 1), ("1 x 3", 3), ("3 x 5", 5)):
        assert entries[case]["tau"] == entries[case]["tau_predicted"] == tokens
    for entry in record["entries"][1:]:
        assert entry["ratio"] == pytest.approx(entry["predicted_ms"] / entry["measured_ms"])
    assert "prefill  predicted" in capsys.readouterr().out


def test_the_check_says_what_is_missing(capsys: pytest.CaptureFixture[str], own_cache: Any) -> None:
    assert check.main(["--model", "no-such-model"]) == 1
    assert "no model named 'no-such-model'" in capsys.readouterr().err
