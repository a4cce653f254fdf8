"""``paceline evaluate sparse``: arguments, exit codes and the order of checks. Heavy libraries are imported inside."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paceline.draftmodels.evaluate.sparse.plan import Plan

_INTERRUPTED = 130


def sparse(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="Sparse model: folder or reference of an artifact.")
    ],
    parent: Annotated[
        str | None,
        typer.Option("--parent", help="Its dense parent, if not found under the name in paceline.json."),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Held-out text for the losses: plain text, or JSON Lines with answers."
        ),
    ] = "built-in",
    text_tokens: Annotated[int, typer.Option(min=1, help="Take so many tokens of it.")] = 20_000,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts for speed: JSON Lines or plain text.")
    ] = "built-in",
    limit: Annotated[int, typer.Option(min=1, help="Take so many prompts, the categories in turn.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timed rounds of parent and student; 0 measures losses only.")
    ] = 3,
    draft: Annotated[
        str, typer.Option("--draft", help="Time both with this draft too: a model reference, or ngram.")
    ] = "none",
    max_draft_tokens: Annotated[
        int | None, typer.Option(help="Draft tokens per block.  [default: 4]", show_default=False)
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Of both: auto, fp32, bf16 or int8, as in paceline serve.")
    ] = "auto",
    threads: Annotated[str, typer.Option(help="CPU threads; auto takes the physical cores.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write report.json and report.png here."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the figures into the student's paceline.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a sparse student beside its dense parent: losses on held-out text, decode speed, bytes.

    Both run as they are served. Ctrl-C reports the rounds that are finished.
    """
    from paceline.draftmodels.evaluate.report import check_folder
    from paceline.draftmodels.evaluate.sparse.plan import Plan, find_parent, find_student, make_config
    from paceline.server.errors import ConfigError

    logging.basicConfig(format="%(message)s")
    logging.getLogger("paceline").setLevel(logging.INFO)
    if draft == "none" and max_draft_tokens is not None:
        raise ConfigError("--max-draft-tokens does nothing without a --draft; name one or leave it out")
    if draft == "auto":
        raise ConfigError("--draft auto: name the draft; what comes with Paceline is made for the parent")
    folder, manifest = find_student(student)
    if record and manifest is None:
        raise ConfigError(f"--record: {folder} has no paceline.json; only artifacts keep figures")
    flags = {
        "draft": draft,
        "max_draft_tokens": None if max_draft_tokens is None else str(max_draft_tokens),
        "weights": weights,
        "threads": threads,
    }
    config = make_config(student, find_parent(manifest, parent), flags)
    if output is not None:
        import matplotlib as _  # noqa: F401  a missing extra is told now, not after the measurement

        check_folder(output)
    plan = Plan(config, manifest, prompts, limit, max_tokens, text, text_tokens, rounds)
    raise typer.Exit(_run(plan, folder, output=output, records=record, as_json=as_json))


def _run(plan: "Plan", folder: Path, *, output: Path | None, records: bool, as_json: bool) -> int:
    """Measure, report what is finished, and return the exit code."""
    from rich.console import Console

    from paceline.draftmodels.evaluate.report import write
    from paceline.draftmodels.evaluate.sparse.measure import Outcome, describe, measure
    from paceline.draftmodels.evaluate.sparse.report import as_json as to_json
    from paceline.draftmodels.evaluate.sparse.report import plot, print_report, recorded
    from paceline.server.models.manifest import MANIFEST, write_manifest

    outcome = Outcome()
    measure(plan, outcome)
    if outcome.found is not None:
        setting = describe(plan, outcome)
        report = to_json(setting, outcome.found, interrupted=outcome.interrupted)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            print_report(Console(), setting, outcome.found)
        if output is not None:
            write(output, report, plot)
            _note(f"wrote {output}")
        if records and plan.manifest is not None and not outcome.interrupted:
            write_manifest(folder, recorded(plan.manifest, setting, outcome.found))
            _note(f"wrote {folder / MANIFEST}")
    if outcome.interrupted:
        _note(
            "interrupted; only what was finished is reported" + (", nothing is recorded" if records else "")
        )
        return _INTERRUPTED
    return 0


def _note(text: str) -> None:
    sys.stderr.write(f"paceline evaluate sparse: {text}\n")
