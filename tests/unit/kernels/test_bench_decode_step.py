"""The decode-step bench on a small decoder: it checks before it times, and its record holds what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_kernels import require_native
from torch import Tensor

from paceline.kernels import reference
from paceline.kernels.bench import ceiling, decode_step
from paceline.kernels.bench.ceiling import Reader
from paceline.kernels.bench.decode_step import CASES, check_linears, check_rows, run_case
from paceline.kernels.bench.record import RESULTS, CheckFailedError
from paceline.kernels.bench.shapes import SHAPES, Shape, executor, random_plan
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import KernelsMissing, Pool
from paceline.kernels.formats import Format

SMALL = Shape(2, 128, 192, 4, 2, 32, 1400, qkv_bias=True)


@pytest.fixture
def pool() -> Pool:
    require_native("portable")
    return Pool(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command knows one small shape, runs in an empty folder, and finds the memory in no time."""
    monkeypatch.setattr(decode_step, "SHAPES", {"smollm2-135m": SMALL})
    monkeypatch.chdir(tmp_path)


def test_layers_have_memory_of_their_own(pool: Pool) -> None:
    plan = random_plan(SMALL, "int8", pool)
    places = [linear.data.data_ptr() for linear in plan.linears]
    assert len(set(places)) == len(places) == 9
    assert plan.layers[0].qkv.bias is not None
    assert plan.layers[0].down.data.equal(plan.layers[1].down.data)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_right_results_pass_the_checks(pool: Pool, format: Format) -> None:
    plan = random_plan(SMALL, format, pool)
    assert 0 < check_linears(plan, pool) < 2e-4
    assert check_rows(executor(plan, pool, blocks=1024)) == 57


def test_a_linear_that_is_off_is_caught(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, right = random_plan(SMALL, "int8", pool), reference.linear
    monkeypatch.setattr(reference, "linear", lambda x, layer: right(x, layer) * 1.001)
    with pytest.raises(CheckFailedError, match="int8 256 x 128, 1 rows: off by"):
        check_linears(plan, pool)


def test_a_row_that_depends_on_its_batch_is_caught(pool: Pool) -> None:
    model = executor(random_plan(SMALL, "int8", pool), pool, blocks=1024)

    class Leaky(Executor):
        def __init__(self) -> None:
            """Nothing of its own."""

        def forward(self, tokens: Any, spans: Any, wanted: Any, **more: Any) -> Tensor:
            logits = model.forward(tokens, spans, wanted)
            if len(spans) > 1:
                logits[3] = torch.nextafter(logits[3], torch.tensor(torch.inf))
            return logits

    with pytest.raises(CheckFailedError, match="1 of 57 rows"):
        check_rows(Leaky())


def test_cases_are_what_their_names_say(pool: Pool) -> None:
    calls: list[tuple[int, list[tuple[int, ...]], int]] = []

    class Spy(Executor):
        def __init__(self) -> None:
            """Nothing of its own."""

        def forward(self, tokens: Any, spans: Any, wanted: Any, **more: Any) -> Tensor:
            calls.append((len(tokens), [span[:3] for span in spans], len(wanted)))
            return torch.empty(0)

    for case in CASES:
        run_case(Spy(), case)
    one, five, eight, sixteen, first, second = calls
    assert one == (1, [(0, 1, 100)], 1)
    assert five == (5, [(0, 5, 100)], 5)
    assert eight == (8, [(i, 1, 100) for i in range(8)], 8)
    assert (sixteen[0], sixteen[2]) == (16, 16)
    assert (first, second) == ((512, [(0, 512, 0)], 0), (488, [(0, 488, 512)], 1))


def test_the_reader_keeps_its_best(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(pool, (1 << 20) + 5)  # whole MiB
    readings = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("paceline.kernels.bench.ceiling.time.perf_counter", lambda: next(readings))
    reader.read()
    assert reader.bytes_per_s == (1 << 20) / 4
    reader.read(repeats=2)
    assert reader.bytes_per_s == (1 << 20) / 2


def test_the_ceiling_prints_one_json_line(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert ceiling.main(["1", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["mib"], record["threads"], record["isa"]) == (1, 1, pool.isa)
    assert record["read_gb_s"] > 0


def test_ceiling_checks_times_and_json_in_this_order(
    pool: Pool, small: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / RESULTS).mkdir(parents=True)
    assert decode_step.main(["--quick", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = {
        word: next(i for i, line in enumerate(lines) if word in line)
        for word in ("ceiling", "checked", "decode 1x1")
    }
    assert at["ceiling"] < at["checked"] < at["decode 1x1"]
    record = json.loads(lines[-1])
    (stored,) = (tmp_path / RESULTS).iterdir()
    assert stored.name == f"{record['date']}-decode-step-quick.json"
    assert json.loads(stored.read_text(encoding="utf-8")) == record
    (model,) = record["models"]
    assert [step["case"] for step in model["steps"]] == [case.name for case in CASES]
    decode = model["steps"][0]
    assert decode["share_of_ceiling"] == pytest.approx(model["ceiling_ms"] / decode["ms"], abs=0.05)
    assert model["steps"][-1]["share_of_ceiling"] is None


def test_nothing_is_timed_after_a_failed_check(
    pool: Pool, small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise CheckFailedError("wrong")

    monkeypatch.setattr(decode_step, "check_linears", fail)
    monkeypatch.setattr(decode_step, "time_cases", lambda *_: pytest.fail("timed"))
    assert decode_step.main(["--quick"]) == 1
    assert capsys.readouterr().err == "decode_step: wrong\n"


def test_missing_kernels_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_threads: int) -> Pool:
        raise KernelsMissing("not built")

    monkeypatch.setattr(decode_step, "Pool", missing)
    monkeypatch.setattr(ceiling, "Pool", missing)
    assert decode_step.main([]) == 1
    assert ceiling.main([]) == 1
    assert capsys.readouterr().err == "decode_step: not built\nceiling: not built\n"


def test_shapes_are_those_of_the_real_models() -> None:
    """Weights of all matrices, embedding counted once where it is tied: what the models' names say."""

    def linear_weights(shape: Shape) -> int:
        heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.hidden
        return shape.layers * (heads + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden

    sizes = {name: round(linear_weights(shape) / 1e6, 1) for name, shape in SHAPES.items()}
    assert sizes == {"smollm2-135m": 134.5, "qwen2.5-0.5b": 494.0, "qwen2.5-1.5b": 1543.6}
