"""Accelerators by name: what their data sheets say, read from ``devices.toml``. Knows nothing of models."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from paceline.server.errors import ConfigError

_GB = 1e9
_TERA = 1e12
#: ``2xH100-80GB``: how many, and what.
_GPUS = re.compile(r"(?:(?P<count>[0-9]+)\s*[xX*])?\s*(?P<name>[A-Za-z][\w.+-]*)")
_MOST = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator's data sheet; bytes, bytes per second, dense operations per second.

    Attributes:
        int8_flops: None where it has no faster int8 arithmetic.
        link: bytes per second to its neighbours, one direction.
        source: where the figures are printed.
    """

    name: str
    memory: float
    bandwidth: float
    fp32_flops: float
    bf16_flops: float
    int8_flops: float | None
    link: float
    source: str

    def flops(self, format: str) -> float:
        """Peak of the arithmetic that weights of a format are multiplied in: 4-bit ones are widened to bf16."""
        if format == "fp32":
            return self.fp32_flops
        return self.int8_flops if format == "int8" and self.int8_flops is not None else self.bf16_flops


@cache
def devices() -> Mapping[str, Device]:
    """All known devices by name, aliases included."""
    text = resources.files("paceline.server.planning").joinpath("devices.toml").read_text(encoding="utf-8")
    return parse_devices(text)


def parse_devices(text: str) -> Mapping[str, Device]:
    """Devices of a TOML document; raises KeyError on missing keys (our own bug)."""
    known: dict[str, Device] = {}
    for table in tomllib.loads(text)["devices"]:
        known |= dict.fromkeys((table["name"], *table.get("aliases", ())), _device(table))
    return known


def parse_gpus(text: str) -> tuple[int, Device]:
    """``2xH100-80GB`` -> (2, that device); without a number one.

    Raises:
        ConfigError: not of that form, or a name that is not known; the message names the nearest.
    """
    match = _GPUS.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--gpus: write NAME or COUNTxNAME, such as 2xH100-80GB, not {text!r}")
    count = int(match["count"] or 1)
    if not 1 <= count <= _MOST:
        raise ConfigError(f"--gpus: the number of GPUs must be from 1 to {_MOST}, not {count}")
    by_lower = {name.lower(): device for name, device in devices().items()}
    device = by_lower.get(match["name"].lower())
    if device is None:
        raise _unknown(match["name"])
    return count, device


def _unknown(name: str) -> ConfigError:
    canonical = sorted({device.name for device in devices().values()})
    near = difflib.get_close_matches(name.upper(), [n.upper() for n in canonical], n=1, cutoff=0.5)
    hint = next((f"; did you mean {n}?" for n in canonical if near and n.upper() == near[0]), ";")
    return ConfigError(
        f"--gpus: no data sheet of {name!r}{hint} Known: {', '.join(canonical)}; "
        "of any other give --bandwidth-gbs, --memory-gib and --tflops"
    )


def _device(table: Mapping[str, Any]) -> Device:
    int8 = table.get("int8_tflops")
    return Device(
        name=table["name"],
        memory=table["memory_gb"] * _GB,
        bandwidth=table["bandwidth_gbs"] * _GB,
        fp32_flops=table["fp32_tflops"] * _TERA,
        bf16_flops=table["bf16_tflops"] * _TERA,
        int8_flops=None if int8 is None else int8 * _TERA,
        link=table["link_gbs"] * _GB,
        source=table["source"],
    )
