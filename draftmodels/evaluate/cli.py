"""Measure drafts, sparse students and steered models through the engine that serves them, on held-out prompts and text.

``paceline evaluate``: a group; ``sparse`` and ``steering`` have modules of their own. Owns arguments, exit codes and
the order of checks: whatever can be refused is refused before models are loaded. Heavy libraries are imported by the
command.
"""

import asyncio
import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.draftmodels.evaluate.sparse.command import sparse
from paceline.draftmodels.evaluate.steering.command import steering

if TYPE_CHECKING:
    from paceline.draftmodels.data.prompts import Prompt
    from paceline.draftmodels.evaluate.figures import Result
    from paceline.draftmodels.evaluate.plan import Plan

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


class DraftPolicy(StrEnum):
    """How draft lengths are chosen."""

    fixed = "fixed"
    adaptive = "adaptive"


app.command()(sparse)
app.command()(steering)


@app.callback()
def evaluate() -> None:
    """Measure what this project makes, through the serving engine."""


@app.command()
def draft(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Model: catalog name, hf:ORG/NAME, folder, .gguf, or a configured FILE.toml[:NAME].",
        ),
    ],
    draft: Annotated[
        str, typer.Option("--draft", help="Draft model reference, ngram, or expert of a steered model.")
    ],
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="JSON Lines (prompt or messages, category) or plain text.")
    ] = "built-in",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take so many prompts, the categories in turn. Default: all.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    max_draft_tokens: Annotated[int, typer.Option(help="Draft tokens per block.")] = 4,
    policy: Annotated[
        DraftPolicy, typer.Option(help="fixed always drafts that many; adaptive as far as it pays.")
    ] = DraftPolicy.fixed,
    temperature: Annotated[
        list[float] | None, typer.Option(help="May be repeated.  [default: 0, 1]", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Sample prompt i with seed + i. Default: requests carry no seed.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Requests in flight.")] = 1,
    rounds: Annotated[
        int,
        typer.Option(min=0, help="Timed rounds with and without speculation; 0 measures acceptance only."),
    ] = 3,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFT",
            help="Another draft, timed in every round as well: how much faster is the first? Default: none.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="auto, fp32, bf16 or int8, as in paceline serve.")] = "auto",
    threads: Annotated[str, typer.Option(help="CPU threads; auto takes the physical cores.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write report.json and report.png here."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the figures into the draft's paceline.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a draft: acceptance, tokens per forward, and speed against no speculation.

    Runs the serving engine on prompts that no training may see; two drafts run in the same one. What is timed takes
    turns: one stream within each prompt, several pass by pass. Ctrl-C reports the rounds that are finished.
    """
    from paceline.draftmodels.evaluate import prompts as held_out
    from paceline.draftmodels.evaluate.plan import Plan, check_sampling, make_config
    from paceline.draftmodels.evaluate.record import check_recordable
    from paceline.draftmodels.evaluate.report import check_folder
    from paceline.server.models.sources import resolve
    from paceline.server.models.tokenizer import load_tokenizer

    logging.basicConfig(format="%(message)s")
    logging.getLogger("paceline").setLevel(logging.INFO)
    temperatures = tuple(temperature or (0.0, 1.0))
    check_sampling(temperatures, seed)
    config = make_config(
        {
            "model": target,
            "draft": draft,
            "max_draft_tokens": str(max_draft_tokens),
            "policy": policy.value,
            "weights": weights,
            "threads": threads,
        },
        against,
    )
    plan = Plan(config, prompts, limit, max_tokens, temperatures, seed, streams, rounds)
    chosen = held_out.read(prompts, load_tokenizer(resolve(config.models[0].target)), limit)
    if record:
        check_recordable(plan)
    if output is not None:
        import matplotlib as _  # noqa: F401  a missing extra is told now, not after the measurement

        check_folder(output)
    raise typer.Exit(_run(plan, chosen, output=output, records=record, as_json=as_json))


def _run(plan: "Plan", prompts: "list[Prompt]", *, output: Path | None, records: bool, as_json: bool) -> int:
    """Measure, report what is finished, and return the exit code."""
    from paceline.draftmodels.evaluate.figures import summarize
    from paceline.draftmodels.evaluate.passes import Outcome, measure
    from paceline.draftmodels.evaluate.report import as_json as to_json
    from paceline.draftmodels.evaluate.report import write
    from paceline.draftmodels.evaluate.setting import describe

    outcome, interrupted = Outcome(), False
    try:
        asyncio.run(measure(plan, prompts, outcome))
    except KeyboardInterrupt:
        interrupted = True
    length, seeded = plan.speculation.max_draft_tokens, plan.seed is not None
    results = [summarize(measured, length, seeded=seeded) for measured in outcome.measured]
    setting = describe(plan, prompts, outcome.model, outcome.against)
    report = to_json(setting, results, interrupted=interrupted)
    _print(report, setting, results, as_json=as_json)
    if output is not None and results:
        from paceline.draftmodels.evaluate.plots import plot

        write(output, report, plot)
        _note(f"wrote {output}")
    if interrupted:
        _note(
            "interrupted; only what was finished is reported" + (", nothing is recorded" if records else "")
        )
        return INTERRUPTED
    if records:
        from paceline.draftmodels.evaluate.record import record

        _note(f"wrote {record(plan, setting, results)}")
    return 0


def _print(
    report: dict[str, Any], setting: dict[str, Any], results: "list[Result]", *, as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console

    from paceline.draftmodels.evaluate.report import print_report

    print_report(Console(), setting, results)


def _note(text: str) -> None:
    sys.stderr.write(f"paceline evaluate draft: {text}\n")
