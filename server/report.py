"""What ``paceline info`` tells: versions, CPU, devices, and what "auto" resolves to on this machine.

A plain dictionary, so that JSON and text say the same. Works without torch: what needs it is None then.
"""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from paceline.server.config import Machine, ModelSpec, PacelineConfig, resolve

_PACKAGES = ("paceline", "torch", "transformers", "tokenizers", "safetensors", "gguf", "fastapi", "uvicorn")

#: The instruction sets that decide how fast the arithmetic is.
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi2",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "bf16",
    "i8mm",
)


def report() -> dict[str, Any]:
    """Facts by heading, ready for JSON."""
    machine = Machine()
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return {
        "versions": versions,
        "cpu": {
            "architecture": platform.machine(),
            "usable_cores": machine.usable_cores,
            "features": [feature for feature in _FEATURES if feature in machine.cpu_flags],
        },
        **(
            _torch_facts(machine)
            if versions["torch"]
            else {"devices": None, "executor": None, "kernels": None, "auto": None}
        ),
    }


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same facts as text."""
    for heading, value in facts.items():
        if not isinstance(value, Mapping):
            yield f"{heading}: {_words(value)}"
            continue
        yield f"{heading}:"
        yield from (f"  {name:<16} {_words(entry)}" for name, entry in value.items())


def _words(value: object) -> str:
    if value is None:
        return "not installed"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_facts(machine: Machine) -> dict[str, Any]:
    import torch

    from paceline.server.models.loader import kernels_wanted

    resolved = resolve(PacelineConfig(models=(ModelSpec(name="any", target="any"),)), machine)
    native = kernels_wanted(resolved.engine.device)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "devices": ["cpu", *(f"cuda:{index} {name}" for index, name in enumerate(names))],
        "executor": "native CPU kernels" if native else _torch_executor(resolved.engine.device),
        "kernels": _kernels(resolved.engine.device),
        "auto": {
            "device": resolved.engine.device,
            "threads": resolved.engine.threads,
            "weights": resolved.models[0].weights,
        },
    }


def _kernels(device: str) -> dict[str, str]:
    """The native library, its instruction set, and what runs each operation of ``paceline.kernels``."""
    from paceline.kernels.cpu.library import isa_reason
    from paceline.kernels.dispatch import explain, native_missing

    missing = native_missing()
    state = {"native library": missing or "present", "instruction set": "none" if missing else isa_reason()}
    return state | {f"{c.op} {c.format}": c.words for c in explain(device)}


def _torch_executor(device: str) -> str:
    """Which of torch's paths multiplies the matrices."""
    import torch

    if device == "cuda":
        return f"torch, CUDA {torch.version.cuda}"
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    library = "oneDNN" if has_onednn else "torch's own kernels"
    return f"torch, {library}, {torch.backends.cpu.get_cpu_capability()}"
