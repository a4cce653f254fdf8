"""``python -m paceline.server.backends.vllm.measure FILE``: measures what drafting costs vLLM here, prints a schedule.

Starts the engine of a configuration twice, without its draft and with it, runs batches of several sizes with each, and
times the steps in which the whole batch generates. The last line is JSON; the line before it belongs under
[models.speculation].
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.server.backends.vllm.build import load
from paceline.server.backends.vllm.engine import Connected
from paceline.server.backends.vllm.installed import installed_vllm
from paceline.server.backends.vllm.lengths import StepSeconds, alphas_of, schedule
from paceline.server.config import PacelineConfig, load_config
from paceline.server.engine.interface import StepStats
from paceline.server.errors import ConfigError
from paceline.server.metrics import Metrics
from paceline.server.models.quality import calibration_text, split

_PROMPT_TOKENS = 32


class _Clock(Metrics):
    """Notes when each step was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[float, StepStats]] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append((time.monotonic(), stats))


@dataclass
class _Run:
    """What one engine showed: median seconds by batch size, accepted tokens of every block."""

    seconds: dict[int, float] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)


def main(
    file: Annotated[
        Path, typer.Argument(help="A configuration of paceline serve with a draft.", metavar="FILE")
    ],
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,2,4,8,16,32",
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence.", min=8)] = 64,
) -> None:
    """Print the best draft length by batch size."""
    config = load_config(file, os.environ, {})
    sizes = sorted({int(size) for size in batches.split(",")})
    spec = config.models[0]
    if config.engine.kind != "vllm" or spec.speculation.draft is None:
        raise ConfigError(f'{file}: expected engine.kind = "vllm" and a draft')
    free = replace(spec.speculation, draft_schedule=())
    plain = asyncio.run(_measure(_with(config, replace(free, draft=None)), sizes, tokens))
    drafted = asyncio.run(_measure(_with(config, free), sizes, tokens))
    alphas = alphas_of(drafted.accepted, spec.speculation.max_draft_tokens)
    measured = {
        size: StepSeconds(plain.seconds[size], drafted.seconds[size])
        for size in plain.seconds
        if size in drafted.seconds
    }
    for size, seconds in measured.items():
        typer.echo(
            f"{size:>5} sequences: {1000 * seconds.plain:.1f} ms, drafting {1000 * seconds.longest:.1f} ms a step"
        )
    best = schedule(measured, alphas)
    typer.echo(f"draft_schedule = {json.dumps(best)}")
    found = {str(size): asdict(seconds) for size, seconds in measured.items()}
    typer.echo(
        json.dumps(
            {"schedule": best, "alphas": alphas, "step_seconds": found, "blocks": len(drafted.accepted)}
        )
    )


def _with(config: PacelineConfig, speculation: Any) -> PacelineConfig:
    return replace(config, models=(replace(config.models[0], speculation=speculation),))


async def _measure(config: PacelineConfig, sizes: Sequence[int], tokens: int) -> _Run:
    clock = _Clock()
    connected = await asyncio.to_thread(load, config, clock, installed_vllm())
    run = _Run()
    try:
        for size in sizes:
            if size > connected.max_running:
                continue
            del clock.steps[:]
            await asyncio.gather(*(_generate(connected, number, size, tokens) for number in range(size)))
            full = [(at, step) for at, step in clock.steps if _sequences(step) == size]
            gaps = [after - before for (before, _), (after, _) in pairwise(full)]
            if gaps:
                run.seconds[size] = statistics.median(gaps)
            run.accepted += [count for _, step in clock.steps for count in step.accepted_per_block]
    finally:
        await asyncio.to_thread(connected.llm.shutdown, timeout=5.0)
    return run


def _sequences(step: StepStats) -> int:
    """Sequences that generated in a step; 0 if prompts were computed, too."""
    return 0 if step.prompt_tokens else len(step.drafted_per_block) or step.generated_tokens


async def _generate(connected: Connected, number: int, size: int, tokens: int) -> None:
    ids = connected.model.tokenizer.encode(calibration_text(), add_special_tokens=False)
    prompts = split(ids, _PROMPT_TOKENS)
    params = connected.make_params(
        {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    )
    prompt = {"prompt_token_ids": prompts[number % len(prompts)]}
    async for _ in connected.llm.generate(prompt, params, f"measure-{size}-{number}"):
        pass


if __name__ == "__main__":
    typer.run(main)
