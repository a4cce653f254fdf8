""" "auto" becomes concrete once, for the machine at hand."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from paceline.server.config import (
    EngineConfig,
    Machine,
    ModelSpec,
    PacelineConfig,
    load_config,
    machine,
    resolve,
)
from paceline.server.errors import ConfigError


class FakeMachine(Machine):
    """Its facts are set beforehand, so none is looked up."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        known = {"cuda_available": False, "cpu_flags": frozenset(), "usable_cores": 6}
        self.__dict__.update(known | facts)


def specs(*weights: Literal["auto", "fp32"]) -> tuple[ModelSpec, ...]:
    return tuple(ModelSpec(name=f"m{index}", target="t", weights=word) for index, word in enumerate(weights))


@pytest.mark.parametrize(
    ("device", "facts", "expected"),
    [
        ("auto", {}, ("cpu", "auto")),  # the loader decides, per model
        ("cpu", {"cpu_flags": frozenset({"amx_bf16"}), "cuda_available": True}, ("cpu", "auto")),
        ("auto", {"cuda_available": True}, ("cuda", "bf16")),
        ("cuda", {"cuda_available": True}, ("cuda", "bf16")),
    ],
)
def test_device_and_weights(
    device: Literal["auto", "cpu", "cuda"], facts: dict[str, Any], expected: tuple[str, str]
) -> None:
    config = PacelineConfig(engine=EngineConfig(device=device), models=specs("auto", "fp32"))
    resolved = resolve(config, FakeMachine(**facts))
    assert (resolved.engine.device, resolved.models[0].weights) == expected
    assert resolved.models[1].weights == "fp32"
    assert resolve(resolved, FakeMachine(**facts)) == resolved


def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve(PacelineConfig(engine=EngineConfig(device="cuda")), FakeMachine())


def test_threads_are_the_usable_cores_unless_given() -> None:
    assert resolve(PacelineConfig(), FakeMachine()).engine.threads == 6
    assert resolve(PacelineConfig(engine=EngineConfig(threads=2)), FakeMachine()).engine.threads == 2


def _system(
    root: Path, cores: list[tuple[int, int]], quota: str | None = None, flags: str = "fpu avx2"
) -> None:
    """A file tree that looks like Linux: ``cores`` gives (package, core) per logical CPU."""
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags : other\n")
    for cpu, (package, core) in enumerate(cores):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    if quota is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(quota)


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [
        ({0, 1, 2, 3, 4, 5, 6, 7}, None, 4),  # two threads per core
        ({0, 4}, None, 1),  # both threads of one core
        ({0, 2}, None, 2),  # the same core number in two packages
        ({0, 1, 2, 3}, "max 100000\n", 4),
        ({0, 1, 2, 3}, "250000 100000\n", 3),
        ({0, 1, 2, 3}, "50000 100000\n", 1),
        ({0, 1}, "800000 100000\n", 2),
    ],
)
def test_usable_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affinity: set[int], quota: str | None, cores: int
) -> None:
    _system(tmp_path, [(0, 0), (0, 1), (1, 0), (1, 1)] * 2, quota)
    monkeypatch.setattr(machine, "_affinity", lambda: affinity)
    assert Machine(tmp_path).usable_cores == cores


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: {3, 5})
    blank = Machine(tmp_path)
    assert (blank.usable_cores, blank.cpu_flags, blank.cpu_computes_bf16) == (2, frozenset(), False)


def test_cpu_flags(tmp_path: Path) -> None:
    _system(tmp_path, [], flags="fpu avx512_bf16 fma")
    assert Machine(tmp_path).cpu_flags == {"fpu", "avx512_bf16", "fma"}
    assert Machine(tmp_path).cpu_computes_bf16


def test_torch_is_imported_only_to_ask_for_cuda() -> None:
    code = (
        "import sys; from paceline.server.config import *; import paceline.server.cli; "
        "resolve(load_config(None, {}, {'device': 'cpu'})); "
        "sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_this_machine_resolves() -> None:
    resolved = resolve(load_config(None, {}, {}))
    assert resolved.engine.device in ("cpu", "cuda")
    assert resolved.engine.threads is not None
    assert resolved.models[0].weights in ("bf16", "auto")
