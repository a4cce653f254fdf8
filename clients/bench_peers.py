"""``make bench``: our server beside transformers ``generate`` and llama.cpp, same model, prompts and machine.

Owns the order of measurements and the command line; contenders are ``peers``, figures ``peer_report``, the
roofline ``ceiling``. All contenders are started once and paused; in every round each runs alone, in rotating
order, so that drift of the machine hits all alike. Run ``python -m paceline.clients.bench_peers``; the last
line printed is JSON. Exit codes: 0 done, 1 ours could not be measured, 2 bad usage, 130 interrupted.
"""

import asyncio
import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from paceline.clients.ceiling import BYTES_PER_WEIGHT, Weights, read_bandwidth, read_weights
from paceline.clients.load import parse_concurrency
from paceline.clients.peer_report import Board, busy_share, cpu_model, table, versions
from paceline.clients.peers import (
    Contender,
    PeerError,
    Spec,
    contender,
    llamacpp_spec,
    paceline_spec,
    pull,
    transformers_spec,
)
from paceline.clients.stats import Sample, summarize
from paceline.clients.traffic import ClosedLoop, progress
from paceline.clients.workload import BUILT_IN, Prompt, UsageError, read_prompts

#: Above this share of processor time taken by others before the first round, figures mean little.
BUSY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare and for how long; ``serve`` holds the options of each server of ours."""

    serve: Sequence[Sequence[str]]
    gguf: Path | None
    levels: Sequence[ClosedLoop]
    rounds: int
    max_tokens: int
    requests: int
    prompts: Sequence[Prompt] = BUILT_IN


def say(text: str) -> None:
    """One line on stderr; stdout is the report's."""
    sys.stderr.write(f"bench: {text}\n")


def specs(options: Options, path: Path, board: Board) -> tuple[list[Spec], list[Spec]]:
    """Our servers and the peers that can take part; who cannot is noted on the board."""
    ours = [paceline_spec(str(path), serve) for serve in options.serve]
    peers = []
    gguf = options.gguf or (path if path.suffix == ".gguf" else None)
    if find_spec("xllamacpp") is None:
        board.skipped.append("llama.cpp: xllamacpp is not installed (pip install 'paceline[bench]')")
    elif gguf is None:
        board.skipped.append("llama.cpp: the model is not a GGUF file; name one with --gguf")
    else:
        peers.append(llamacpp_spec(gguf, max(level.concurrency for level in options.levels)))
    if find_spec("transformers") is None or find_spec("torch") is None:
        board.skipped.append("transformers: not installed (pip install 'paceline[server]')")
    else:
        peers += [transformers_spec(path, dtype) for dtype in ("bf16", "fp32")]
    return ours, peers


def round_prompts(options: Options, round_number: int, level: ClosedLoop) -> list[Prompt]:
    """Questions of one round: numbered in front, so that no prefix cache has seen them before."""
    asked = []
    source = itertools.cycle(options.prompts)
    for index in range(max(options.requests, level.min_requests)):
        messages = [dict(message) for message in next(source).body("chat")["messages"]]
        if not isinstance(messages[0].get("content"), str):
            raise UsageError("bench_peers needs prompts whose first message is plain text")
        messages[0]["content"] = f"({round_number}.{level.name}.{index}) {messages[0]['content']}"
        asked.append(Prompt(messages=messages))
    return asked


async def take_turn(one: Contender, options: Options, board: Board, round_number: int) -> None:
    """One contender's turn: wake it, warm it up, measure every level that it takes, pause it again."""
    one.resume()
    await one.ask(options.prompts[0], 4)

    async def send(prompt: Prompt) -> Sample:
        return await one.ask(prompt, options.max_tokens)

    for level in options.levels:
        if one.spec.max_concurrency is not None and level.concurrency > one.spec.max_concurrency:
            continue
        prompts = round_prompts(options, round_number, level)
        label = f"round {round_number}/{options.rounds} {one.spec.name} x{level.name}"
        with progress(label, len(prompts)) as on_sample:
            stats = summarize(level.name, await level.run(send, prompts, on_sample))
        board.add(one.spec.name, stats)
        say(f"{label}: {stats.output_tok_s:.1f} tok/s")
        for message, count in stats.error_messages.items():
            say(f"{label}: {count} errors: {message}")
        one.check_alive()
    one.pause()


async def compare(ours: Sequence[Spec], peers: Sequence[Spec], options: Options, board: Board) -> None:
    """Start everyone paused, then let each run alone in every round.

    Raises:
        PeerError: one of our own servers did not start or died; a peer that does is noted and left out.
    """
    async with AsyncExitStack() as stack:
        running: list[Contender] = []
        for spec in (*ours, *peers):
            say(f"starting {spec.name}")
            try:
                running.append(await stack.enter_async_context(contender(spec)))
                running[-1].pause()
            except PeerError as error:
                _leave_out(spec, ours, board, error)
        board.busy_share = _warn_if_busy()
        for round_number in range(1, options.rounds + 1):
            shift = round_number % len(running)
            for one in running[shift:] + running[:shift]:
                try:
                    await take_turn(one, options, board, round_number)
                except PeerError as error:
                    running.remove(one)
                    _leave_out(one.spec, ours, board, error)


def _leave_out(spec: Spec, ours: Sequence[Spec], board: Board, error: PeerError) -> None:
    """Note a peer's failure; ours is not to be passed over."""
    if spec in ours:
        raise error
    board.skipped.append(str(error))
    say(str(error))


def _warn_if_busy() -> float | None:
    """Look at the machine while all contenders are paused; what it does then is somebody else's."""
    share = busy_share()
    if share is not None and share > BUSY_SHARE:
        say(f"WARNING: with all contenders paused the processors are {share:.0%} busy; figures will be off")
    return share


def _note_ceilings(specs_in: Sequence[Spec], weights: Weights, bandwidth: float, board: Board) -> None:
    """Print and keep the roofline of every contender whose weight format is known."""
    say(f"read bandwidth {bandwidth / 1e9:.1f} GB/s on {os.cpu_count()} threads")
    for spec in specs_in:
        if spec.weight_format in (*BYTES_PER_WEIGHT, "stored"):
            size = weights.bytes_in(spec.weight_format)
            board.ceilings_tok_s[spec.name] = bandwidth / size
            say(f"{spec.name}: {size / 1e6:.0f} MB per forward, ceiling {bandwidth / size:.0f} forwards/s")


def run(model: str, options: Options) -> dict[str, Any]:
    """Measure everything, print the table and return the JSON record.

    Raises:
        PeerError: the model cannot be had, or our own server did not run.
    """
    board = Board()
    path = Path(model).resolve() if Path(model).exists() else pull(model)
    ours, peers = specs(options, path, board)
    weights, bandwidth = read_weights(path), read_bandwidth()
    _note_ceilings([*ours, *peers], weights, bandwidth, board)
    asyncio.run(compare(ours, peers, options, board))
    names = [spec.name for spec in ours]
    rows = board.rows(names)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table(rows, names))
    for line in board.skipped:
        console.print(f"Not measured: {line}", markup=False)
    return {
        "bench_peers": {"model": path.name, "rounds": options.rounds, "max_tokens": options.max_tokens},
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "read_gb_s": round(bandwidth / 1e9, 2),
            "busy_share": board.busy_share,
        },
        "versions": versions(),
        "weights": asdict(weights),
        "rows": rows,
        "skipped": board.skipped,
    }


def bench_peers(
    model: Annotated[str, typer.Option(help="Catalog name, .gguf file or folder.")] = "smollm2-135m-instruct",
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp, if the model is not a GGUF file.")] = None,
    serve: Annotated[
        list[str] | None, typer.Option(help="`paceline serve` options of ours; repeat to compare several.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Streams at once, one level after the other.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Every contender runs once per round.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer; none stops earlier.")] = 96,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests per level, 2 per stream at least.")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="As for `paceline bench`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Compare this server with transformers and llama.cpp on this machine."""
    try:
        options = Options(
            serve=[shlex.split(words) for words in serve or ["--weights bf16"]],
            gguf=gguf.resolve() if gguf else None,
            levels=parse_concurrency(concurrency),
            rounds=rounds,
            max_tokens=max_tokens,
            requests=num_prompts,
            prompts=read_prompts(prompts) if prompts else BUILT_IN,
        )
        text = json.dumps(run(model, options))
    except (PeerError, UsageError) as error:
        say(str(error))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(bench_peers)
