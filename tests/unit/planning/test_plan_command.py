"""``paceline plan``: data sheets, what it prints, its JSON, and one line for every mistake. No CPU is measured here."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import psutil
import pytest
from native_drafts import write_draft, write_feature_draft
from sparse_students import write_tiny_student
from tiny import tiny_hf_config

from paceline.clients import console
from paceline.server.errors import ConfigError
from paceline.server.planning import measured
from paceline.server.planning.inputs import acceptance, read_model
from paceline.server.planning.measured import Rates

GPU = ("--gpus", "H100")
OWN = ("--bandwidth-gbs", "100", "--memory-gib", "1", "--tflops", "1")
SHORT = ("--prompt-tokens", "40", "--output-tokens", "20")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(arguments)`` -> exit code, stdout, stderr of ``paceline plan``."""
    point = EntryPoint("plan", "paceline.server.planning.cli:plan", console.GROUP)
    monkeypatch.setattr(console, "_points", lambda: {"plan": point})

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # making checkpoints shows a bar
        code = console.main(["plan", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def planned(run: Run, config: Path) -> Callable[..., dict[str, Any]]:
    """``planned(arguments)`` -> the JSON of a plan for the tiny model."""

    def call(*arguments: str) -> dict[str, Any]:
        code, out, err = run("--model", str(config), "--json", *SHORT, *arguments)
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A bare configuration: no weights are anywhere."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_hf_config("llama")))
    return path


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Measuring finds these rates at once; the list holds what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> Rates:
        asked.append(arguments)
        return Rates(30e9, 25e9, 300e9, 200e9, 5e9, 40e9, 2.0, 0.05)

    monkeypatch.setattr(measured, "measure", measure)
    return asked


def test_tables_for_people(run: Run, config: Path) -> None:
    code, out, err = run(
        "--model", str(config), *GPU, "--qps", "10", "--draft", "ngram", "--alpha", "0.9", *SHORT
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "config.json in bf16, on H100-80GB"
    for words in ("weights  ", "KV cache  ", "sequences  ", "computing binds  ", "a prompt  ", "a replica  "):
        assert any(line.strip().startswith(words) for line in lines), words
    header = next(line.split() for line in lines if line.startswith("sequences"))
    assert " ".join(header) == "sequences step ms tokens/s each draft step ms tau tokens/s each c v speed-up"
    assert any(line.startswith("Drafting with ngram pays ") for line in lines)
    assert any(line.startswith("10 requests/s: 1 replica (by utilization)") for line in lines)
    notes = out.partition("Assumptions\n")[2]
    assert "device: H100-80GB (public figures: NVIDIA H100 data sheet, SXM5)" in notes
    assert "bandwidth reached: 0.7 (published: gpt-fast" in notes
    assert "acceptance: 0.9 (given with --alpha)" in notes


def test_the_json_says_the_same_with_units(planned: Any) -> None:
    found = planned(*GPU, "--qps", "10", "--draft", "ngram", "--alpha", "0.9", "--max-running", "3")
    assert list(found) == [
        "model", "device", "devices_per_replica", "weights", "memory", "request", "draft", "max_batch",
        "compute_binds_at_sequences", "batches", "max_qps_per_replica", "load", "assumptions",
    ]  # fmt: skip
    assert found["max_batch"] == 3
    assert found["memory"]["usable_bytes"] == 0.9 * 80e9
    assert [row["sequences"] for row in found["batches"]] == [1, 2, 3]
    best = found["batches"][0]["best"]
    assert best["draft_tokens"] == 4
    assert best["tokens_per_step"] == pytest.approx((1 - 0.9**5) / 0.1)
    assert best["speedup"] == pytest.approx(best["tokens_per_step"] / (best["c"] * 4 + best["v"]))
    assert found["load"]["replicas"] == found["load"]["devices"] == 1
    each = found["load"]["per_replica"]
    assert each["qps"] == 10
    assert 0 < each["batch"] < 3
    assert found["load"]["latency_ms"] > found["load"]["ttft_ms"] > found["load"]["itl_ms"] > 0
    assert {"name", "value", "source"} == set(found["assumptions"][0])
    assert planned(*GPU)["load"] is None
    assert planned(*GPU)["draft"] is None


def test_every_figure_of_the_devices_own_counts(planned: Any) -> None:
    """Bytes over bandwidth: the tiny model's forward is bound by reading, as is its KV."""
    base = planned(*OWN, "--bandwidth-efficiency", "1")
    step = base["batches"][0]["plain"]["step_ms"]
    kv = base["memory"]["kv_bytes_per_token"] * (40 + 10 + 1)
    assert step == pytest.approx((base["weights"]["bytes_per_forward"] + kv) / 100e9 * 1e3)
    assert base["device"] == "GPU as given"
    assert base["memory"]["usable_bytes"] == 2**30
    half = planned(*OWN, "--bandwidth-efficiency", "0.5")
    assert half["batches"][0]["plain"]["step_ms"] == pytest.approx(2 * step)
    slow = planned(
        "--bandwidth-gbs", "100", "--memory-gib", "1", "--tflops", "1e-6", "--compute-efficiency", "0.5"
    )
    assert slow["compute_binds_at_sequences"] < 1
    assert slow["batches"][0]["plain"]["step_ms"] > 100 * step
    sheet = planned(*GPU, "--memory-gib", "2", "--bandwidth-gbs", "100", "--bandwidth-efficiency", "1")
    assert sheet["memory"]["usable_bytes"] == 2 * 2**30
    assert sheet["batches"][0]["plain"]["step_ms"] == pytest.approx(step, rel=1e-3)


def test_formats_and_sparsity_change_the_bytes(planned: Any) -> None:
    sizes = {
        w: planned(*GPU, "--weights", w)["weights"]["bytes_per_forward"]
        for w in ("fp32", "bf16", "int8", "int4")
    }
    assert sizes["fp32"] == 2 * sizes["bf16"]
    assert sizes["bf16"] > sizes["int8"]
    assert sizes["bf16"] > sizes["int4"]
    sparse = planned(*GPU, "--sparsity", "0.5")["weights"]
    assert sparse["sparsity"] == 0.5
    assert sparse["bytes_per_forward"] < sizes["bf16"]


def test_several_gpus_share_one_model_or_make_replicas(run: Run, planned: Any, config: Path) -> None:
    four = planned("--gpus", "4xH100")
    assert four["devices_per_replica"] == 4
    assert four["device"] == "4 x H100-80GB"
    assert any(note["name"] == "all-reduce" for note in four["assumptions"])
    two = planned("--gpus", "4xH100", "--tensor-parallel", "2", "--qps", "1")
    assert two["devices_per_replica"] == 2
    assert (two["load"]["replicas"], two["load"]["replicas_given"], two["load"]["devices"]) == (1, 2, 2)
    most = planned("--gpus", "H100")["max_qps_per_replica"]
    arguments = ("--gpus", "2xH100", "--tensor-parallel", "1", "--qps", str(3 * most), *SHORT)
    _, out, _ = run("--model", str(config), *arguments)
    assert "requests/s: 4 replicas (by utilization); what was named makes 2\n" in out


def test_goals_take_more_replicas_and_impossible_ones_are_said(run: Run, planned: Any, config: Path) -> None:
    alone = planned(*OWN, "--qps", "0.001")["load"]
    busy = planned(*OWN, "--qps", "20000", "--max-running", "16")["load"]
    goal = str(1.1 * alone["itl_ms"])
    better = planned(*OWN, "--qps", "20000", "--max-running", "16", "--itl-ms", goal)["load"]
    assert better["replicas"] > busy["replicas"]
    assert better["reason"] == "latency goals"
    assert better["itl_ms"] <= float(goal)
    impossible = planned(*OWN, "--qps", "1", "--ttft-ms", "1e-9")["load"]
    assert impossible["replicas"] is None
    assert "first token takes" in impossible["reason"]
    _, out, _ = run("--model", str(config), *OWN, "--qps", "1", "--ttft-ms", "1e-9", *SHORT)
    assert "1 requests/s: no number of replicas will do: first token takes" in out


def test_a_cpu_is_measured_for_this_model(planned: Any, rates: list[tuple[Any, ...]]) -> None:
    found = planned("--device", "cpu", "--threads", "1", "--memory-gib", "1", "--sparsity", "0.5")
    ((config, format, sparsity, threads),) = rates
    assert (config.hidden_size, format, sparsity, threads) == (64, "int8", 0.5, 1)
    assert found["device"].endswith(", 1 threads")
    assert found["max_batch"] == 64  # serve's own default
    values = {note["name"]: note["value"] for note in found["assumptions"]}
    assert values["rates"] == "25.0 GB/s, 0.3 TFLOP/s (0.2 in prompts)"
    assert values["overlap of reading and computing"] == "p-norm, p = 2"
    assert values["attention"] == "40 GFLOP/s, K and V read at 5.0 GB/s"
    assert found["batches"][0]["plain"]["step_ms"] > 0.19  # the engine's own time counts


@pytest.mark.parametrize(("others", "warns"), [(5.0, False), (80.0, True)])
def test_a_busy_machine_is_no_place_to_measure(
    planned: Any, rates: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, others: float, warns: bool
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: others)
    found = planned("--device", "cpu")
    source = next(note["source"] for note in found["assumptions"] if note["name"] == "rates")
    assert ("OTHERS TOOK 80% OF THE PROCESSORS" in source) == warns


def test_a_cpu_as_given_is_not_measured(planned: Any, rates: list[tuple[Any, ...]]) -> None:
    found = planned("--device", "cpu", *OWN)
    assert rates == []
    assert found["device"] == "CPU as given"
    step = (found["weights"]["bytes_per_forward"] + 51 * found["memory"]["kv_bytes_per_token"]) / 100e9
    assert found["batches"][0]["plain"]["step_ms"] == pytest.approx(step * 1e3 + 0.196, rel=0.5)


def test_a_drafts_bytes_format_and_acceptance_come_from_its_folder(
    planned: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    measured_alphas = [
        {"dataset": "a", "temperature": 0.0, "alpha": 0.8},
        {"dataset": "b", "alpha": 0.7},
        {"tau": 2},
    ]
    draft = write_feature_draft(
        tmp_path / "d", tiny_checkpoint("llama"), int8=True, measured=tuple(measured_alphas)
    )
    found = planned(*GPU, "--draft", str(draft))
    assert found["draft"]["alpha"] == 0.7
    assert found["draft"]["name"] == "d"
    source = next(note["source"] for note in found["assumptions"] if note["name"] == "acceptance")
    assert source == "least of those in its paceline.json: b"
    assert planned(*GPU, "--draft", str(draft), "--alpha", "0.9")["draft"]["alpha"] == 0.9
    plain = planned(*GPU)
    # Beside its own K and V, the target's states are kept for it: 64 values of 2 bytes.
    assert (
        found["memory"]["kv_bytes_per_token"] == plain["memory"]["kv_bytes_per_token"] + 64 * 2 + 2 * 32 * 2
    )
    in_bf16 = write_feature_draft(tmp_path / "bf16", tiny_checkpoint("llama"))
    bytes_of = [
        planned(*GPU, "--draft", str(d), "--alpha", "1")["draft"]["bytes_per_forward"]
        for d in (draft, in_bf16)
    ]
    assert bytes_of[0] < 0.6 * bytes_of[1]


def test_without_a_recorded_acceptance_there_must_be_one(tiny_checkpoint: Any, tmp_path: Path) -> None:
    bad = [{"alpha": True}, {"alpha": 2.0}, {"alpha": "0.5"}, {}]
    draft = write_draft(
        tmp_path / "d", tiny_checkpoint("llama"), tiny_checkpoint("llama"), measured=tuple(bad)
    )
    with pytest.raises(
        ConfigError, match=r"--draft: no acceptance rate is recorded for d; measure it with paceline"
    ):
        acceptance(read_model(str(draft)))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_students_sparsity_is_read_from_its_files(
    pattern: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    student = write_tiny_student(
        tmp_path / "s", tiny_checkpoint("llama"), pattern=pattern, dtype="int8", sparsity=0.75
    )
    facts = read_model(str(student))
    assert facts.weights == "int8"
    assert facts.sparsity == pytest.approx(0.75 if pattern == "unstructured" else 0.5, abs=0.01)


def test_a_folder_needs_its_configuration_only(run: Run, tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_checkpoint("qwen2") / "config.json", folder)
    code, out, _ = run("--model", str(folder), *GPU, *SHORT)
    assert code == 0
    assert out.startswith("bare in bf16, on H100-80GB\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "say on what: --gpus 2xH100-80GB, --device cpu, or"),
        (("--bandwidth-gbs", "1", "--tflops", "1"), 2, "say on what"),
        ((*GPU, "--device", "cpu"), 2, "--gpus contradicts --device cpu"),
        ((*GPU, "--threads", "2"), 2, "--threads means nothing on GPUs; leave it out"),
        (("--device", "cpu", "--tensor-parallel", "2"), 2, "--tensor-parallel means nothing on a CPU"),
        (("--device", "cpu", "--link-gbs", "2"), 2, "--link-gbs means nothing on a CPU"),
        (("--device", "cpu", "--weights", "int4"), 2, "--weights: the CPU kernels run fp32, bf16 and int8"),
        (("--device", "cpu", "--tflops", "1"), 2, "--bandwidth-gbs and --tflops replace measuring the CPU"),
        (
            ("--device", "cpu", "--compute-efficiency", "0.5"),
            2,
            "--compute-efficiency means nothing where the CPU is",
        ),
        (("--device", "cpu", "--threads", "2", *OWN), 2, "--threads says what to measure with"),
        ((*GPU, "--alpha", "0.5"), 2, "--alpha says how often a draft is right: name one with --draft"),
        ((*GPU, "--draft", "ngram"), 2, "--draft ngram: how often n-grams are right depends on the text"),
        ((*GPU, "--ttft-ms", "5"), 2, "--ttft-ms and --itl-ms are goals under a load: give --qps"),
        ((*GPU, "--qps", "1", "--itl-ms", "0"), 2, "--itl-ms: must be above 0"),
        ((*GPU, "--bandwidth-gbs", "0"), 2, "--bandwidth-gbs: must be above 0"),
        ((*GPU, "--tensor-parallel", "2"), 2, "--tensor-parallel: 2 is over the 1 of --gpus"),
        (
            ("--gpus", "3xH100", "--tensor-parallel", "2"),
            2,
            "--tensor-parallel: 2 does not divide the 3 of --gpus",
        ),
        (("--gpus", "3xH100"), 2, "--tensor-parallel: 3 devices do not divide the model's 4 attention heads"),
        ((*OWN, "--tensor-parallel", "2"), 2, "--link-gbs: several devices share one model; say how fast"),
        ((*GPU, "--memory-gib", "1e-4"), 2, "the model does not fit: weights take 0.0 GiB"),
        ((*GPU, "--context-tokens", "1000"), 2, "--context-tokens: 1000 is over the model's 512 tokens"),
        (
            (*GPU, "--prompt-tokens", "500"),
            2,
            "--prompt-tokens and --output-tokens are 628 together, over the context",
        ),
        (("--gpus", "H1000"), 2, "--gpus: no data sheet of 'H1000'; did you mean"),
        ((*GPU, "--draft", "no-such-draft"), 1, "no model named 'no-such-draft'"),
        ((*GPU, "--weights", "int3"), 2, "Invalid value for '--weights'"),
        ((*GPU, "--qps", "-1"), 2, "Invalid value for '--qps'"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, config: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    got, out, err = run(
        "--model", str(config), *(() if "--prompt-tokens" in arguments else SHORT), *arguments
    )
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert err.removeprefix("paceline").removeprefix(" plan").removeprefix(": ").startswith(said)


def test_drafts_and_models_that_do_not_go_together(
    run: Run, config: Path, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    target = tiny_checkpoint("llama")
    feature = write_feature_draft(tmp_path / "feature", target)
    code, _, err = run("--model", str(feature), *GPU, *SHORT)
    assert (code, err) == (
        2,
        "paceline: --model: feature can only draft; plan its target and name it with --draft\n",
    )
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(tiny_hf_config("llama", hidden_size=128, head_dim=32)))
    code, _, err = run("--model", str(wide), *GPU, *SHORT, "--draft", str(feature), "--alpha", "0.5")
    assert code == 2
    assert "reads states of width 64, but the model's have 128" in err
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tiny_hf_config("llama", vocab_size=400)))
    code, _, err = run("--model", str(config), *GPU, *SHORT, "--draft", str(other), "--alpha", "0.5")
    assert code == 2
    assert "has a vocabulary of 400 ids, the model one of 300" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ('{"model_type": "mamba"}', "model type 'mamba'"),
        (json.dumps(tiny_hf_config("llama", hidden_size=-1)), "hidden_size must be a whole number"),
    ],
)
def test_a_configuration_that_is_none(run: Run, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    code, out, err = run("--model", str(path), *GPU)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1
