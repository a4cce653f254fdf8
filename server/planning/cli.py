"""``paceline plan``: argument shapes and exit codes; what follows from them is ``request``'s and ``plan``'s business.

Importing this module stays cheap: what is heavy is imported by the command.
"""

from enum import StrEnum
from typing import Annotated

import typer

from paceline.server.errors import ConfigError


class WeightFormat(StrEnum):
    """Formats whose bytes are known."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class PlanDevice(StrEnum):
    """Where to run."""

    cpu = "cpu"
    gpu = "gpu"


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="Catalog name, hf:ORG/NAME[@REV], folder, .gguf file, or a config.json.", metavar="MODEL"
        ),
    ],
    *,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Devices of one replica, such as 2xH100-80GB.", metavar="[N x]NAME", show_default=False
        ),
    ] = None,
    device: Annotated[
        PlanDevice | None,
        typer.Option(
            help="cpu: this machine, measured; gpu with figures of your own. Default: gpu where --gpus is given.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        WeightFormat,
        typer.Option(help="auto: what an artifact is stored in, else int8 on a CPU and bf16 on GPUs."),
    ] = WeightFormat.auto,
    sparsity: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.99,
            help="Share of the blocks' weights left out. Default: the artifact's own.",
            show_default=False,
        ),
    ] = None,
    qps: Annotated[float, typer.Option(min=0.0, help="Requests per second; 0 plans no load.")] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Mean answer.")] = 128,
    context_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Longest sequence. Default: the model's own.", show_default=False),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help='Draft: bundled or catalog name, folder, .gguf, or "ngram".', show_default=False),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Acceptance rate. Default: the least that the draft's paceline.json records.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, max=32, help="Longest draft block.")] = 4,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Devices that share one model. Default: all of --gpus.", show_default=False),
    ] = None,
    ttft_ms: Annotated[
        float | None, typer.Option(min=0.0, help="Goal: mean time to the first token.", show_default=False)
    ] = None,
    itl_ms: Annotated[
        float | None, typer.Option(min=0.0, help="Goal: mean time between tokens.", show_default=False)
    ] = None,
    bandwidth_gbs: Annotated[
        float | None,
        typer.Option(min=0.0, help="Memory bandwidth of one device, 10^9 bytes/s.", show_default=False),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.0, help="Memory of one device.", show_default=False)
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.0, help="Dense 10^12 operations/s in the weights' format.", show_default=False),
    ] = None,
    link_gbs: Annotated[
        float | None, typer.Option(min=0.0, help="Between two devices, one direction.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads to measure with. Default: the physical cores.", show_default=False
        ),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most sequences at once. Default: as paceline serve on a CPU, as many as fit on GPUs.",
            show_default=False,
        ),
    ] = None,
    utilization: Annotated[float, typer.Option(min=0.05, max=1.0, help="How full a replica may be.")] = 0.8,
    bandwidth_efficiency: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the bandwidth that is reached.", show_default=False),
    ] = None,
    compute_efficiency: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the operations that is reached.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Plan capacity on paper: tokens per second, sequences that fit, when a draft pays, replicas for a load.

    By the roofline: what a forward must read and compute, over what the device reads and computes. No weights are
    loaded and nothing is served. What is assumed is printed with the result.
    """
    from paceline.server.planning.footprint import WEIGHTS
    from paceline.server.planning.options import Options
    from paceline.server.planning.report import as_dict, show
    from paceline.server.planning.request import prepare

    if gpus is not None and device is PlanDevice.cpu:
        raise ConfigError("--gpus contradicts --device cpu; keep one of the two")
    prepared = prepare(
        Options(
            model=model,
            gpus=gpus,
            on_cpu=device is PlanDevice.cpu,
            weights=next((known for known in WEIGHTS if known == weights.value), None),
            sparsity=sparsity,
            qps=qps,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            context_tokens=context_tokens,
            draft=draft,
            alpha=alpha,
            draft_tokens=draft_tokens,
            tensor_parallel=tensor_parallel,
            ttft_ms=ttft_ms,
            itl_ms=itl_ms,
            bandwidth_gbs=bandwidth_gbs,
            memory_gib=memory_gib,
            tflops=tflops,
            link_gbs=link_gbs,
            threads=threads,
            max_running=max_running,
            utilization=utilization,
            bandwidth_efficiency=bandwidth_efficiency,
            compute_efficiency=compute_efficiency,
        )
    )
    if as_json:
        import json

        typer.echo(json.dumps(as_dict(prepared), indent=2))
    else:
        show(prepared)
