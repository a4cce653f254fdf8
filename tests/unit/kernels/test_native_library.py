"""With and without the native library: what is chosen, what is said, what is refused."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import request, spec, tiny_engine, tokens
from native_kernels import pool, require_native

from paceline.kernels import dispatch, ops
from paceline.kernels.cpu import library
from paceline.kernels.formats import PackedLinear
from paceline.server import report
from paceline.server.engine.cpu_runner import CpuRunner
from paceline.server.engine.runner import TorchRunner
from paceline.server.errors import ConfigError
from paceline.server.models import loader

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment changes take effect: nothing is remembered from before, nor after."""

    def forget() -> None:
        library.library.cache_clear()
        loader._warn_missing.cache_clear()

    for name in ("PACELINE_KERNELS", "PACELINE_ISA"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def missing(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if no compiler had been there at install time."""
    fresh.delenv("PACELINE_NATIVE_LIBRARY", raising=False)
    fresh.setattr(library, "_find", lambda: None)
    return fresh


def test_the_package_builds_without_a_compiler(tmp_path):
    env = {**os.environ, "CC": "false", "CXX": "false"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-{part}={tmp_path / part}" for part in ("lib", "temp")]
    result = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "_native" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_the_library_torch_runs_and_one_warning_says_why(missing, caplog, tiny_checkpoint):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine = tiny_engine(spec(tiny_checkpoint("llama")))
    [record] = [r for r in caplog.records if "CPU kernels" in r.getMessage()]
    assert "compiler" in record.getMessage()
    assert isinstance(engine._models["m"].runner, TorchRunner)
    assert len(tokens(engine, request([5, 6, 7], max_tokens=3, ignore_eos=True))[0]) == 3


def test_without_the_library_int8_and_native_are_refused_in_one_line(missing, tiny_checkpoint):
    with pytest.raises(
        ConfigError, match=r"--weights int8 needs the native CPU kernels.*bf16 or fp32"
    ) as caught:
        tiny_engine(spec(tiny_checkpoint("llama"), weights="int8"))
    assert "\n" not in str(caught.value)
    missing.setenv("PACELINE_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"PACELINE_KERNELS is native, but .*compiler"):
        tiny_engine(spec(tiny_checkpoint("llama")))


def test_without_the_library_the_reference_is_chosen_and_explained(missing):
    choices = {(c.op, c.format): c for c in dispatch.explain()}
    linear = choices["linear", "int8"]
    assert linear.kernel is not None
    assert linear.kernel.name == "reference"
    assert "compiler" in linear.words
    assert choices["attention", "bf16"].words.startswith("none (native: ")
    with pytest.raises(dispatch.NoKernelError, match="compiler"):
        dispatch.kernel("attention", "bf16", "cpu", has_pool=True)
    facts = report.report()
    assert facts["executor"].startswith("torch, ")
    assert "compiler" in facts["kernels"]["native library"]
    assert facts["kernels"]["instruction set"] == "none"
    layer = PackedLinear("fp32", 16, 4, torch.ones(16 * 4).view(torch.uint8))
    assert torch.equal(ops.linear(torch.ones(1, 4), layer), torch.full((1, 16), 4.0))


def test_with_the_library_the_kernels_run_and_info_says_so(fresh, tiny_checkpoint):
    require_native()
    assert isinstance(tiny_engine(spec(tiny_checkpoint("llama")))._models["m"].runner, CpuRunner)
    facts = report.report()
    widest = library.usable_isas()[-1]
    assert facts["executor"] == "native CPU kernels"
    assert facts["kernels"]["native library"] == "present"
    assert facts["kernels"]["instruction set"].startswith(f"{widest} (the widest")
    for op in (
        "linear fp32",
        "linear bf16",
        "linear int8",
        "attention fp32",
        "attention bf16",
        "argmax fp32",
    ):
        assert facts["kernels"][op] == f"native ({widest})"
    assert f"  linear int8      native ({widest})" in list(report.lines(facts))
    fresh.setenv("PACELINE_KERNELS", "torch")
    assert isinstance(tiny_engine(spec(tiny_checkpoint("llama")))._models["m"].runner, TorchRunner)
    assert report.report()["executor"].startswith("torch, ")


def test_a_narrower_instruction_set_can_be_forced(fresh):
    require_native()
    fresh.setenv("PACELINE_ISA", "portable")
    assert library.Pool(1).isa == "portable"
    assert "PACELINE_ISA" in report.report()["kernels"]["instruction set"]
    assert dispatch.choose("linear", "int8").words == "native (portable)"


def test_wrong_values_are_one_clear_error(fresh, tiny_checkpoint):
    require_native()
    fresh.setenv("PACELINE_ISA", "sse2")
    with pytest.raises(ConfigError, match=r"^PACELINE_ISA is 'sse2'; usable on this machine: portable"):
        tiny_engine(spec(tiny_checkpoint("llama")))
    fresh.setenv("PACELINE_KERNELS", "cuda")
    with pytest.raises(ConfigError, match=r"^PACELINE_KERNELS is 'cuda'; use native, torch or triton"):
        tiny_engine(spec(tiny_checkpoint("llama")))


def test_another_build_is_loaded_by_name_or_reported_missing(fresh, tmp_path):
    require_native()
    here = library._find()
    assert here is not None
    other = tmp_path / "other.so"
    other.write_bytes(here.read_bytes())
    fresh.setenv("PACELINE_NATIVE_LIBRARY", str(other))
    library.library.cache_clear()
    assert library.library()._name == str(other)
    fresh.setenv("PACELINE_NATIVE_LIBRARY", str(tmp_path / "nothing.so"))
    library.library.cache_clear()
    assert "no such file" in str(dispatch.native_missing())
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    fresh.setenv("PACELINE_NATIVE_LIBRARY", str(broken))
    assert "broken.so" in str(dispatch.native_missing())


def test_a_library_of_another_version_is_refused(fresh):
    require_native()
    fresh.setattr(library, "ABI_VERSION", 99)
    library.library.cache_clear()
    assert "needs 99: reinstall" in str(dispatch.native_missing())


def test_choices_depend_on_the_pool_and_the_device():
    require_native()
    with_pool = dispatch.kernel("linear", "int8", "cpu", has_pool=True)
    assert (with_pool.name, with_pool.device) == ("native", "cpu")
    assert dispatch.kernel("linear", "int8", "cpu", has_pool=False).name == "reference"
    assert dispatch.choose("argmax", "fp32", "cuda").words == "reference (the only one)"
    nothing = dispatch.choose("linear", "int4")
    assert (nothing.kernel, nothing.words) == (None, "none (no implementation for int4 on cpu)")
    x = torch.randn(3, 64)
    layer = pool("portable").pack(torch.randn(16, 64), "int8")
    assert torch.equal(with_pool.run(x, layer, pool("portable")), ops.linear(x, layer, pool("portable")))
