"""``paceline train-sparse``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.draftmodels.jobs.interrupts import interruptible
from paceline.draftmodels.jobs.start import Wish, begin, pace, run_facts
from paceline.draftmodels.sparse_finetune.recipe import load_recipe, recipe_keys, resumed_recipe
from paceline.server.config.flags import with_flags


@with_flags(recipe_keys)
def train_sparse(
    student: Annotated[
        str, typer.Argument(help="Folder of a sparse student, as paceline sparsify writes it.")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Recipe (TOML), or the name of a packaged one: squarehead (as the defaults), ce, ce-kl; flags win.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
    **flags: Any,
) -> None:
    """Recover a sparse student by fine-tuning under its fixed mask, its dense parent teaching (SquareHead).

    The best student by perplexity on held-out text is RUN/best, ready for paceline serve. Ctrl-C leaves a checkpoint;
    the same command with --resume goes on from it, as it does after a kill. Under torchrun the job is data parallel.
    """
    from paceline.draftmodels.finetune.arithmetic import decided
    from paceline.draftmodels.sparse_finetune.job import run_job

    wish = Wish("student", student, output, recipe, resume, flags, load_recipe, resumed_recipe)
    chosen, ranks = begin(wish, decided)
    with interruptible():
        outcome = run_job(student, chosen, output, ranks)
    if ranks.is_main:
        typer.echo(json.dumps(_facts(outcome)) if as_json else _text(_facts(outcome)))


def _facts(outcome: Any) -> dict[str, Any]:
    measured = outcome.state.measured
    best = min(measured, key=lambda figures: figures["perplexity"])
    return {**run_facts(outcome), "start": measured[0], "measured": best}


def _text(facts: dict[str, Any]) -> str:
    start, best = facts["start"], facts["measured"]
    return (
        f"{facts['best']}: perplexity {best['perplexity']:.3f} on held-out text "
        f"({start['perplexity']:.3f} before, teacher {best['teacher_perplexity']:.3f}), KL to the teacher "
        f"{best['kl']:.4f} ({start['kl']:.4f} before); "
        f"{pace(facts)}"
    )
