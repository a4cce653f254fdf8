"""``paceline bench``: a load generator for any OpenAI-compatible server.

Owns the command line, the order of load levels and the report; the wire is ``stream``, pacing ``traffic``,
figures ``stats``, prompts ``workload``. Prints a table and, last, one line of JSON. Exit codes: 0 done, 1 no
request succeeded or the server cannot be used, 2 bad usage, 130 interrupted.
"""

import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer
from rich.console import Console
from rich.table import Table

from paceline.clients.stats import LevelStats, Percentiles, Sample, summarize
from paceline.clients.stream import ServerError, Target, first_model, measure, negotiate, new_client
from paceline.clients.traffic import ClosedLoop, Level, OpenLoop, progress
from paceline.clients.workload import BUILT_IN, Endpoint, Prompt, UsageError, read_prompts

COUNTED_BY_TEXT = {
    "continuous_usage": "the server's running count in each chunk",
    "usage": "the server's total per request, spread evenly over its chunks",
    "chunks": "chunks, as the server sends no usage: figures are off if a chunk holds several tokens",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated load test.

    Attributes:
        target: an empty ``model`` means the first that the server lists.
        requests: per level; None sends every prompt once, but at least two per worker.
        warmup: uncounted requests before the first level.
    """

    target: Target
    levels: Sequence[Level]
    prompts: Sequence[Prompt] = BUILT_IN
    requests: int | None = None
    warmup: int = 2
    api_key: str | None = None
    timeout_s: float = 600.0


def _note(text: str) -> None:
    sys.stderr.write(f"paceline bench: {text}\n")


async def _prepare(client: httpx.AsyncClient, plan: Plan) -> Target:
    """Settle model and token counting, then warm up."""
    target = plan.target
    if not target.model:
        target = replace(target, model=await first_model(client, target.base_url))
        _note(f"no --model given: using {target.model!r}, the first that the server lists")
    try:
        target = await negotiate(client, target, plan.prompts[0])
    except ServerError as error:
        raise ServerError(f"{target.url}: {error}", status=error.status) from error
    for prompt in itertools.islice(itertools.cycle(plan.prompts), plan.warmup):
        await measure(client, target, prompt)
    return target


async def _run_level(client: httpx.AsyncClient, target: Target, plan: Plan, level: Level) -> LevelStats:
    count = plan.requests or max(len(plan.prompts), level.min_requests)
    prompts = itertools.islice(itertools.cycle(plan.prompts), count)

    async def send(prompt: Prompt) -> Sample:
        return await measure(client, target, prompt)

    with progress(level.name, count) as on_sample:
        return summarize(level.name, await level.run(send, prompts, on_sample))


@dataclass(slots=True)
class Outcome:
    """What has been measured so far; it is filled level by level, so that it survives an interruption."""

    target: Target
    levels: list[LevelStats] = field(default_factory=list)


async def run_plan(plan: Plan, outcome: Outcome) -> None:
    """Warm up and run every level.

    Raises:
        ServerError: the server cannot be used at all; failures of single requests are counted instead.
    """
    async with new_client(plan.api_key, timeout_s=plan.timeout_s) as client:
        outcome.target = await _prepare(client, plan)
        for level in plan.levels:
            outcome.levels.append(await _run_level(client, outcome.target, plan, level))


def _stacked(figures: Percentiles) -> str:
    """Median over tail, in one cell."""
    return "\n".join("-" if value is None else f"{value:.1f}" for value in (figures.p50, figures.p99))


def levels_table(levels: Sequence[LevelStats]) -> Table:
    """The human-readable report; fits 80 columns."""
    table = Table(
        caption="tok/s each: per request; its p99 is the slow tail", title="Load test", show_lines=True
    )
    for name in ("load", "requests", "errors", "tok/s", "", "TTFT ms", "ITL ms", "e2e ms", "tok/s each"):
        table.add_column(name, justify="right")
    for stats in levels:
        counts = (stats.level, str(stats.requests), str(stats.errors), f"{stats.output_tok_s:.1f}")
        figures = (stats.ttft_ms, stats.itl_ms, stats.e2e_ms, stats.request_tok_s)
        table.add_row(*counts, "p50\np99", *map(_stacked, figures))
    return table


def _report(outcome: Outcome, *, as_json: bool, interrupted: bool) -> None:
    levels = outcome.levels
    if not as_json:
        console = Console()
        console.print(levels_table(levels))
        for counted_by in sorted({source for stats in levels for source in stats.counted_by}):
            console.print(f"Tokens counted by {COUNTED_BY_TEXT[counted_by]}.")
        errors: Counter[str] = Counter()
        for stats in levels:
            errors.update(stats.error_messages)
        for message, count in errors.most_common(5):
            console.print(f"Error, {count} times: {message}", markup=False)
    record = {
        "bench": asdict(outcome.target),
        "interrupted": interrupted,
        "levels": [stats.to_json() for stats in levels],
    }
    typer.echo(json.dumps(record))


def _base_url(url: str) -> str:
    """``http://host:port`` gets ``/v1``; an address with a path is taken as it is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"--url {url!r} is not an address such as http://127.0.0.1:8000")
    return url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _levels(concurrency: str | None, rate: float | None, seed: int | None) -> list[Level]:
    if rate is not None:
        if concurrency is not None:
            raise UsageError("--rate and --concurrency exclude each other: give one")
        if not 0 < rate < float("inf"):
            raise UsageError(f"--rate {rate} is not a positive number of requests per second")
        return [OpenLoop(rate, seed or 0)]
    return [*parse_concurrency(concurrency or "1,8")]


def parse_concurrency(text: str) -> list[ClosedLoop]:
    """``"1,8"`` as levels.

    Raises:
        UsageError: not a list of positive whole numbers.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--concurrency {text!r} is not a list of positive whole numbers such as 1,8")
    return [ClosedLoop(int(word)) for word in words]


def _extra(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise UsageError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError('--extra-body is not a JSON object such as {"top_k": 40}')
    return fields


def _run(plan: Plan, *, as_json: bool) -> int:
    """Run, report and return the exit code."""
    outcome = Outcome(plan.target)
    interrupted = False
    try:
        asyncio.run(run_plan(plan, outcome))
    except KeyboardInterrupt:
        interrupted = True
        _note("interrupted; reporting the levels that were finished")
    _report(outcome, as_json=as_json, interrupted=interrupted)
    if interrupted:
        return 130
    return 1 if all(stats.errors == stats.requests for stats in outcome.levels) else 0


def bench(
    url: Annotated[
        str, typer.Option(help="Server address; /v1 is added to a bare one.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model id. Default: the first that the server lists.")] = "",
    concurrency: Annotated[
        str | None, typer.Option(help="Requests in flight, one level after the other. Default: 1,8.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Instead of --concurrency: Poisson arrivals, requests per second.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON Lines (prompt or messages) or plain text. Default: a built-in set."),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Requests per level. Default: each prompt once, 2 per worker at least."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Unless a prompt says otherwise.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Sent with each request; also fixes --rate's moments.")
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API to ask.")] = "chat",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always generate max-tokens.")] = False,
    warmup: Annotated[int, typer.Option(min=0, help="Uncounted requests before the first level.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest silence in seconds.")] = 600.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="PACELINE_API_KEY", help="Sent as bearer token.")
    ] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object merged into every request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> None:
    """Measure TTFT, inter-token latency and tokens/s of any OpenAI-compatible server."""
    fields = {"max_tokens": max_tokens, "temperature": temperature}
    fields |= {"ignore_eos": True} if ignore_eos else {}
    fields |= {"seed": seed} if seed is not None else {}
    target = Target(_base_url(url), model, endpoint, {**fields, **_extra(extra_body)})
    questions = read_prompts(prompts) if prompts else BUILT_IN
    for prompt in questions:
        prompt.body(endpoint)  # A prompt that does not fit the endpoint is told before anything is sent.
    levels = _levels(concurrency, rate, seed)
    plan = Plan(target, levels, questions, num_prompts, warmup, api_key, timeout)
    raise typer.Exit(_run(plan, as_json=as_json))
