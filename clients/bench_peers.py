"""``make bench``: our server beside llama.cpp, vLLM and transformers, same model, prompts and machine.

Owns the command line and the record of a run; presets are ``bench_presets``, contenders ``peer_specs``, the order of
measurements ``bench_rounds``, figures ``peer_report``, the roofline ``ceiling``. Run ``python -m
paceline.clients.bench_peers``; the last line printed is JSON. Exit codes: 0 done, 1 ours could not be measured,
2 bad usage, 130 interrupted.
"""

import asyncio
import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from paceline.clients import bench_presets
from paceline.clients.bench_presets import Plan, find_preset
from paceline.clients.bench_rounds import Rounds, say
from paceline.clients.ceiling import Bandwidth, read_bandwidth
from paceline.clients.load import parse_concurrency
from paceline.clients.machine import cpu_model, versions
from paceline.clients.peer_files import pull
from paceline.clients.peer_report import Board, ratio_table, table
from paceline.clients.peer_specs import Cast, vllm_version
from paceline.clients.peers import PeerError, Spec
from paceline.clients.workload import UsageError, read_prompts

#: Committed results; used if the bench is run from a checkout.
RESULTS = Path("kernels/bench/results")
INTERRUPTED = "interrupted"
_GGUF_MAGIC = b"GGUF"
#: What --quick makes of a plan: no figures to quote, but every part has run.
QUICK = {"rounds": 1, "max_tokens": 32, "requests": 2, "requests_per_stream": 1}


def note_ceilings(specs: Sequence[Spec], bandwidth: Bandwidth, board: Board) -> None:
    """Print and keep the roofline of every contender of which it is known what it reads."""
    speed = bandwidth.bytes_per_s
    say(f"read bandwidth {speed / 1e9:.1f} GB/s on {os.cpu_count()} threads ({bandwidth.measured_with})")
    for spec in specs:
        if spec.forward_bytes is not None:
            board.ceilings_tok_s[spec.name] = rate = speed / spec.forward_bytes
            say(f"{spec.name}: {spec.forward_bytes / 1e6:.0f} MB per forward, ceiling {rate:.0f} forwards/s")


def run(plan: Plan) -> dict[str, Any]:
    """Measure, print the tables and return the JSON record; ``ended_early`` in it says what broke the run off.

    Raises:
        PeerError: the model cannot be had.
    """
    board = Board()
    model = pull(plan.model)
    cast = Cast(plan, model, board.skipped.append)
    specs = [*cast.ours(), *cast.peers()]
    for line in board.skipped:
        say(f"left out: {line}")
    bandwidth = read_bandwidth()
    note_ceilings(specs, bandwidth, board)
    ended_early = None
    try:
        asyncio.run(Rounds(specs, plan, board).run())
    except KeyboardInterrupt:
        ended_early = INTERRUPTED
    except PeerError as error:
        ended_early = str(error)
    show(board, ended_early)
    vllm = plan.vllm_python and vllm_version(plan.vllm_python)
    return {
        "bench": "bench_peers",
        "preset": plan.preset,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model.name,
        "draft": plan.draft and Path(plan.draft).name,
        "rounds": plan.rounds,
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "read_gb_s": round(bandwidth.bytes_per_s / 1e9, 2),
            "read_measured_with": bandwidth.measured_with,
            "busy_share": board.busy_share,
        },
        "versions": {**versions(), "vllm": vllm or "not given"},
        "rows": board.rows(),
        "ours_over_best": board.ours_over_best(),
        "skipped": board.skipped,
        "ended_early": ended_early,
    }


def show(board: Board, ended_early: str | None) -> None:
    """Print both tables, and who is not in them."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table(board.rows()))
    console.print(ratio_table(board.ours_over_best()))
    for line in board.skipped:
        console.print(f"Not measured: {line}", markup=False)
    if ended_early:
        console.print(f"Ended early: {ended_early}", markup=False)


def store(record: dict[str, Any], out: Path | None, *, quick: bool) -> None:
    """Write the record, one row per line, where it was asked for, else into the checkout's results.

    Raises:
        UsageError: it cannot be written there.
    """
    if out is None and not RESULTS.is_dir():
        say(f"not stored: there is no {RESULTS} here; name a file with --out")
        return
    path = out or RESULTS / f"{record['date'][:10]}-{record['preset']}{'-quick' if quick else ''}.json"
    parts = []
    for key, value in record.items():
        lines = value if isinstance(value, list) else None
        text = "[\n " + ",\n ".join(map(json.dumps, lines)) + "\n]" if lines else json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    try:
        path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror or error}") from error
    say(f"stored in {path}")


def _gguf_file(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                raise UsageError(f"--gguf {path}: not a GGUF file")
    except OSError as error:
        raise UsageError(f"--gguf {path}: {error.strerror or error}") from error
    return path.resolve()


def bench_peers(
    preset: Annotated[str, typer.Option(help="smollm2 or qwen-pair: model, draft, streams.")] = "smollm2",
    model: Annotated[
        str | None, typer.Option(help="Instead of the preset's: name, .gguf file or folder.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Instead of the preset's: a draft model.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp, if the model is not a GGUF file.")] = None,
    serve: Annotated[
        list[str] | None, typer.Option(help="`paceline serve` options of ours; repeat to compare several.")
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help="Of llama.cpp,vllm,transformers; or none. Default: all.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(envvar="PACELINE_VLLM_PYTHON", help="Interpreter that has vLLM.")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Of short,long (1,000 tokens). Default: both.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Streams at once, such as 1,4,16.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Every contender runs once per round.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer; none stops earlier.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests per level at least.")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="For short prompts; as for `paceline bench`.")] = None,
    restart: Annotated[
        bool | None, typer.Option(help="Start contenders anew for each turn: less memory, more time.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short round: a trial, no figures.")] = False,
    out: Annotated[Path | None, typer.Option(help=f"Result file. Default: in {RESULTS}.")] = None,
) -> None:
    """Compare this server with llama.cpp, vLLM and transformers on this machine."""
    try:
        chosen = find_preset(preset)
        drafted = draft or chosen.draft
        plan = Plan(
            preset=preset,
            model=model or chosen.model,
            draft=drafted,
            serve=[shlex.split(words) for words in serve or []] or bench_presets.serve_options(drafted),
            scenarios=bench_presets.scenarios(
                chosen, scenario, parse_concurrency(concurrency) if concurrency else None
            ),
            rounds=rounds,
            max_tokens=max_tokens,
            requests=num_prompts,
            temperature=temperature,
            requests_per_stream=chosen.requests_per_stream,
            prompts=read_prompts(prompts) if prompts else chosen.prompts,
            peers=bench_presets.peers(peers),
            gguf=_gguf_file(gguf) if gguf else None,
            vllm_python=vllm_python.absolute() if vllm_python else None,
            llamacpp_q8_0=chosen.llamacpp_q8_0,
            transformers_dtypes=chosen.transformers_dtypes,
            restart=chosen.restart if restart is None else restart,
        )
        record = run(replace(plan, **QUICK) if quick else plan)  # type: ignore[arg-type]
        store(record, out, quick=quick)
    except (PeerError, UsageError) as error:
        say(str(error))
        raise typer.Exit(error.exit_code) from error
    typer.echo(json.dumps(record))
    if record["ended_early"]:
        raise typer.Exit(130 if record["ended_early"] == INTERRUPTED else 1)


if __name__ == "__main__":
    typer.run(bench_peers)
