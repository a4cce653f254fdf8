"""``paceline evaluate steering``: arguments, exit codes, the order of checks. Heavy libraries are imported inside."""

import asyncio
import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paceline.draftmodels.evaluate.steering.plan import Plan
    from paceline.draftmodels.evaluate.steering.tasks import Question

_INTERRUPTED = 130


class ScoreName(StrEnum):
    """How an answer is judged."""

    exact = "exact"
    contains = "contains"
    number = "number"


def steering(
    config: Annotated[
        Path,
        typer.Option("--config", metavar="FILE", help="Configuration with a steered model, as for serve."),
    ],
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Task: JSON Lines with prompt (or messages), answer and task."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the steered model, if the file has several.")
    ] = None,
    pair: Annotated[str | None, typer.Option(help="Pair whose strength sweeps, if it has several.")] = None,
    tuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The target tuned directly: the ceiling.")
    ] = None,
    alphas: Annotated[str, typer.Option(help="Strengths of the sweep, betas in mode amplify.")] = (
        "0,0.5,1,1.5,2"
    ),
    score: Annotated[
        ScoreName, typer.Option(help="How an answer is right: equal, contained, or its last number.")
    ] = ScoreName.exact,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take so many questions, the tasks in turn.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    streams: Annotated[
        int, typer.Option(min=1, max=64, help="Requests in flight, but where one alone is timed.")
    ] = 8,
    timed: Annotated[int, typer.Option(min=1, help="Questions of the timed passes.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timed rounds with and without speculation; 0 scores only.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write report.json, report.png and answers.jsonl here."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a steered model: task scores beside its base, its expert and a tuned base, gap closed, speed.

    Greedy, through the serving engine. Ctrl-C reports what is finished.
    """
    from paceline.draftmodels.evaluate.report import check_folder
    from paceline.draftmodels.evaluate.steering import plan as planning
    from paceline.draftmodels.evaluate.steering.tasks import read_questions
    from paceline.server.models.sources import resolve
    from paceline.server.models.tokenizer import load_tokenizer

    logging.basicConfig(format="%(message)s")
    logging.getLogger("paceline").setLevel(logging.INFO)
    read = planning.read_config(config)
    chosen = planning.find_steered(read, model, config)
    swept = planning.find_pair(chosen, pair)
    plan = planning.Plan(
        planning.served(read, chosen, swept, tuned),
        chosen.name,
        swept,
        planning.parse_strengths(alphas, swept),
        data,
        score.value,
        limit,
        max_tokens,
        tuple(stop or ()),
        streams,
        timed,
        rounds,
    )
    questions = read_questions(data, load_tokenizer(resolve(chosen.target)), plan.score, limit)
    if output is not None:
        import matplotlib as _  # noqa: F401  a missing extra is told now, not after the measurement

        check_folder(output)
    raise typer.Exit(_run(plan, questions, output=output, as_json=as_json))


def _run(plan: "Plan", questions: "list[Question]", *, output: Path | None, as_json: bool) -> int:
    """Measure, report what is finished, and return the exit code."""
    from rich.console import Console

    from paceline.draftmodels.evaluate.steering.figures import summarize
    from paceline.draftmodels.evaluate.steering.measure import measure
    from paceline.draftmodels.evaluate.steering.outcome import Outcome
    from paceline.draftmodels.evaluate.steering.report import as_json as to_json
    from paceline.draftmodels.evaluate.steering.report import describe, print_report

    outcome, interrupted = Outcome(), False
    try:
        asyncio.run(measure(plan, questions, outcome))
    except KeyboardInterrupt:
        interrupted = True
    rows, setting = summarize(plan, questions, outcome), describe(plan, questions, outcome)
    report = to_json(setting, rows, interrupted=interrupted)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    elif rows:
        print_report(Console(), setting, rows)
    if output is not None and rows:
        from paceline.draftmodels.evaluate.report import write
        from paceline.draftmodels.evaluate.steering.plots import plot
        from paceline.draftmodels.evaluate.steering.report import answers_of

        write(output, report, plot, {"answers.jsonl": answers_of(questions, outcome)})
        _note(f"wrote {output}")
    if interrupted:
        _note("interrupted; only what was finished is reported")
        return _INTERRUPTED
    return 0


def _note(text: str) -> None:
    sys.stderr.write(f"paceline evaluate steering: {text}\n")
