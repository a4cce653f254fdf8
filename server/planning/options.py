"""What ``paceline plan`` is told, and what of it contradicts itself. Knows no models and no devices."""

from dataclasses import dataclass

from paceline.server.errors import ConfigError
from paceline.server.planning.assumptions import UTILIZATION
from paceline.server.planning.footprint import Weights


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options; None is what its help calls the default."""

    model: str
    gpus: str | None = None
    on_cpu: bool = False
    weights: Weights | None = None
    sparsity: float | None = None
    qps: float = 0.0
    prompt_tokens: int = 512
    output_tokens: int = 128
    context_tokens: int | None = None
    draft: str | None = None
    alpha: float | None = None
    draft_tokens: int = 4
    tensor_parallel: int | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    bandwidth_gbs: float | None = None
    memory_gib: float | None = None
    tflops: float | None = None
    link_gbs: float | None = None
    threads: int | None = None
    max_running: int | None = None
    utilization: float = UTILIZATION
    bandwidth_efficiency: float | None = None
    compute_efficiency: float | None = None


def check_options(options: Options) -> None:
    """Refuse what contradicts itself or says too little.

    Raises:
        ConfigError: names the option.
    """
    if (
        options.gpus is None
        and not options.on_cpu
        and None in (options.bandwidth_gbs, options.memory_gib, options.tflops)
    ):
        raise ConfigError(
            "say on what: --gpus 2xH100-80GB, --device cpu, or --bandwidth-gbs, --memory-gib and --tflops of a device"
        )
    for name in ("bandwidth_gbs", "memory_gib", "tflops", "link_gbs", "ttft_ms", "itl_ms"):
        if getattr(options, name) == 0.0:
            raise ConfigError(f"--{name.replace('_', '-')}: must be above 0")
    if options.alpha is not None and options.draft is None:
        raise ConfigError(
            "--alpha says how often a draft is right: name one with --draft (ngram for n-grams)"
        )
    if not options.qps and (options.ttft_ms or options.itl_ms):
        raise ConfigError("--ttft-ms and --itl-ms are goals under a load: give --qps")
    if options.on_cpu:
        measured = (options.bandwidth_gbs is None, options.tflops is None)
        if measured == (True, True):
            refuse(
                "where the CPU is measured",
                bandwidth_efficiency=options.bandwidth_efficiency,
                compute_efficiency=options.compute_efficiency,
            )
        elif any(measured):
            raise ConfigError("--bandwidth-gbs and --tflops replace measuring the CPU: give both or neither")
        elif options.threads is not None:
            raise ConfigError(
                "--threads says what to measure with, and --bandwidth-gbs and --tflops that nothing is"
            )
        refuse("on a CPU", tensor_parallel=options.tensor_parallel, link_gbs=options.link_gbs)
        if options.weights == "int4":
            raise ConfigError("--weights: the CPU kernels run fp32, bf16 and int8; int4 is not built yet")
    else:
        refuse("on GPUs", threads=options.threads)


def refuse(where: str, **values: object) -> None:
    """Refuse options that were given although nothing would read them.

    Raises:
        ConfigError: names the first of them.
    """
    for name, value in values.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing {where}; leave it out")
