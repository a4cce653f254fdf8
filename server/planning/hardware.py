"""What a plan's replicas run on: this CPU, measured or as given, or GPUs by their data sheets.

Owns where each rate comes from, and says so in the plan's assumptions. Knows no formulas.
"""

from dataclasses import dataclass

import psutil

from paceline.server.config.machine import Machine as Host
from paceline.server.errors import ConfigError
from paceline.server.planning import assumptions as known
from paceline.server.planning.assumptions import Assumption
from paceline.server.planning.devices import Device, parse_gpus
from paceline.server.planning.footprint import Footprint, Weights
from paceline.server.planning.options import Options
from paceline.server.planning.roofline import Machine, Overheads

_GB, _GIB, _TERA = 1e9, 2**30, 1e12
#: More than this of the processors taken by others spoils a measurement, looked at for so long.
_BUSY, _LISTEN_SECONDS = 0.1, 0.5
#: Source of what the user said.
GIVEN = "given"
_FREE_SOURCE = f"{known.CPU_MEMORY_SHARE:g} of what is free now; {known.CPU_MEMORY_SOURCE}"
_NO_SHEET = Device("", 0.0, 0.0, 0.0, 0.0, None, 0.0, "")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One replica's machine.

    Attributes:
        replicas: how many of them the devices that were named make.
    """

    name: str
    machine: Machine
    replicas: int
    assumptions: tuple[Assumption, ...]


def on_cpu(options: Options, target: Footprint) -> Hardware:
    """This machine: measured, or with the rates that were given."""
    free = options.memory_gib is None
    memory = _free_bytes() if options.memory_gib is None else options.memory_gib * _GIB
    notes = [
        Assumption("memory", f"{memory / _GIB:.1f} GiB", _FREE_SOURCE if free else GIVEN),
        Assumption("engine", _overheads_text(known.CPU_OVERHEADS), known.CPU_OVERHEADS_SOURCE),
    ]
    if options.bandwidth_gbs is not None and options.tflops is not None:
        bandwidth, flops = _reached(options, options.bandwidth_gbs * _GB, options.tflops * _TERA)
        machine = Machine(memory, bandwidth, bandwidth, flops, flops, overheads=known.CPU_OVERHEADS)
        text = f"{GIVEN}; attention is taken to read and to compute as fast"
        return Hardware("CPU as given", machine, 1, (*notes, Assumption("rates", _rates_text(machine), text)))
    return _measured(options, target, memory, notes)


def _measured(options: Options, target: Footprint, memory: float, notes: list[Assumption]) -> Hardware:
    from paceline.kernels.bench.record import cpu_model
    from paceline.server.planning.measured import measure

    threads = options.threads or Host().usable_cores
    busy = psutil.cpu_percent(interval=_LISTEN_SECONDS) / 100
    assert target.weights != "int4"
    rates = measure(target.config, target.weights, target.sparsity, threads)
    machine = rates.machine(memory, known.CPU_OVERHEADS)
    spoilt = (
        f"; OTHERS TOOK {busy:.0%} OF THE PROCESSORS: repeat it on an idle machine" if busy > _BUSY else ""
    )
    notes += [
        Assumption(
            "rates",
            f"{_rates_text(machine)} ({rates.chunk_flops / _TERA:.3g} in prompts)",
            f"measured now with {threads} threads, weights of this shape but random, fitted within "
            f"{rates.fit_error:.0%}; reading alone {rates.ceiling / _GB:.1f} GB/s{spoilt}",
        ),
        Assumption(
            "attention",
            f"{rates.attention_flops / _GB:.0f} GFLOP/s, K and V read at {rates.kv_bandwidth / _GB:.1f} GB/s",
            "measured now",
        ),
        Assumption("overlap of reading and computing", f"p-norm, p = {rates.overlap:g}", "measured now"),
    ]
    return Hardware(f"{cpu_model()}, {threads} threads", machine, 1, tuple(notes))


def _free_bytes() -> float:
    return known.CPU_MEMORY_SHARE * psutil.virtual_memory().available


def on_gpus(options: Options, target: Footprint) -> Hardware:
    """GPUs by their data sheets, each figure replaced by the user's own."""
    count, sheet = (options.tensor_parallel or 1, None) if options.gpus is None else parse_gpus(options.gpus)
    devices = options.tensor_parallel or count
    if devices > count:
        raise ConfigError(f"--tensor-parallel: {devices} is over the {count} of --gpus")
    if count % devices:
        raise ConfigError(
            f"--tensor-parallel: {devices} does not divide the {count} of --gpus into whole replicas"
        )
    figures = _figures(options, sheet, target.weights)
    if devices > 1 and not figures.link:
        raise ConfigError("--link-gbs: several devices share one model; say how fast they are linked")
    bandwidth, flops = _reached(options, figures.bandwidth, figures.flops)
    machine = Machine(
        memory=figures.memory if options.memory_gib is not None else known.GPU_MEMORY_SHARE * figures.memory,
        bandwidth=bandwidth,
        kv_bandwidth=bandwidth,
        linear_flops=flops,
        attention_flops=flops if target.weights != "int8" else flops * figures.attention_share,
        devices=devices,
        link=figures.link,
        all_reduce_seconds=known.ALL_REDUCE_SECONDS if devices > 1 else 0.0,
        overheads=known.GPU_OVERHEADS,
    )
    name = "GPU as given" if sheet is None else sheet.name
    name = f"{devices} x {name}" if devices > 1 else name
    return Hardware(name, machine, count // devices, tuple(_gpu_notes(options, machine, sheet)))


@dataclass(frozen=True, slots=True)
class _Figures:
    """Of one device; ``attention_share``: what attention, in bf16, computes of the linears' rate."""

    memory: float
    bandwidth: float
    flops: float
    link: float
    attention_share: float = 1.0


def _figures(options: Options, sheet: Device | None, weights: Weights) -> _Figures:
    """The data sheet's, each replaced by the user's own; without a sheet ``check_options`` saw that all are given."""

    def pick(given: float | None, unit: float, printed: float) -> float:
        return printed if given is None else given * unit

    own = sheet or _NO_SHEET
    flops = pick(options.tflops, _TERA, own.flops(weights))
    return _Figures(
        memory=pick(options.memory_gib, _GIB, own.memory),
        bandwidth=pick(options.bandwidth_gbs, _GB, own.bandwidth),
        flops=flops,
        link=pick(options.link_gbs, _GB, own.link),
        attention_share=1.0 if sheet is None else min(1.0, sheet.bf16_flops / flops),
    )


def _gpu_notes(options: Options, machine: Machine, sheet: Device | None) -> list[Assumption]:
    notes = [
        Assumption("device", sheet.name, f"public figures: {sheet.source}") if sheet is not None else None,
        Assumption(
            "bandwidth reached",
            f"{options.bandwidth_efficiency or known.BANDWIDTH_EFFICIENCY:g}",
            known.BANDWIDTH_SOURCE if options.bandwidth_efficiency is None else GIVEN,
        ),
        Assumption(
            "computing reached",
            f"{options.compute_efficiency or known.COMPUTE_EFFICIENCY:g}",
            known.COMPUTE_SOURCE if options.compute_efficiency is None else GIVEN,
        ),
        Assumption("rates", _rates_text(machine), "per device, by the above"),
        Assumption(
            "memory",
            f"{machine.memory / _GIB:.1f} GiB per device",
            f"{known.GPU_MEMORY_SHARE:g} of it: {known.GPU_MEMORY_SOURCE}"
            if options.memory_gib is None
            else GIVEN,
        ),
        Assumption("engine", _overheads_text(machine.overheads), known.GPU_OVERHEADS_SOURCE),
        Assumption(
            "all-reduce",
            f"{machine.all_reduce_seconds * 1e6:g} us and its bytes over {machine.link / _GB:g} GB/s",
            known.ALL_REDUCE_SOURCE,
        )
        if machine.devices > 1
        else None,
    ]
    return [note for note in notes if note is not None]


def _reached(options: Options, bandwidth: float, flops: float) -> tuple[float, float]:
    """Rates with their efficiency: on a CPU what was given is taken as reached."""
    default = (1.0, 1.0) if options.on_cpu else (known.BANDWIDTH_EFFICIENCY, known.COMPUTE_EFFICIENCY)
    return (
        bandwidth * (options.bandwidth_efficiency or default[0]),
        flops * (options.compute_efficiency or default[1]),
    )


def _rates_text(machine: Machine) -> str:
    return f"{machine.bandwidth / _GB:,.1f} GB/s, {machine.linear_flops / _TERA:,.3g} TFLOP/s"


def _overheads_text(over: Overheads) -> str:
    values = {
        "a step": "step",
        "a sequence": "sequence",
        "a row": "row",
        "drafting": "drafting",
        "a drafted sequence": "drafted",
    }
    spent = [
        f"{getattr(over, name) * 1e6:.0f} us {text}" for text, name in values.items() if getattr(over, name)
    ]
    return ", ".join(spent) or "no time of its own"
