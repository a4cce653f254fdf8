"""``paceline train-sparse``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.draftmodels.jobs.recipes import check_new_run, save_start, saved_start
from paceline.draftmodels.sparse_finetune.recipe import load_recipe, recipe_keys, resumed_recipe
from paceline.server.config.flags import with_flags
from paceline.server.errors import ConfigError


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
    if resume and recipe is not None:
        raise ConfigError("--recipe: a resumed run keeps the recipe that it was started with; leave it out")
    from paceline.draftmodels.jobs.ranks import Ranks
    from paceline.draftmodels.sparse_finetune.job import run_job
    from paceline.draftmodels.sparse_finetune.opening import arithmetic
    from paceline.server.log import configure_logging

    if resume:
        started_from, saved = saved_start(output, "student")
        if student != started_from:
            raise ConfigError(f"STUDENT: {output} was started from {started_from}, not {student}")
        chosen = resumed_recipe(saved, flags, str(output))
    else:
        chosen = load_recipe(recipe, flags)
    chosen = replace(chosen, dtype=arithmetic(chosen.dtype, chosen.device))
    configure_logging("text")
    ranks = Ranks.from_environment()
    if ranks.is_main:
        if not resume:
            check_new_run(output)
        save_start(output, "student", student, asdict(chosen))
    ranks.from_main(None)  # the others wait until the folder is there
    outcome = run_job(student, chosen, output, ranks)
    if ranks.is_main:
        typer.echo(json.dumps(_facts(outcome)) if as_json else _text(_facts(outcome)))


def _facts(outcome: Any) -> dict[str, Any]:
    state = outcome.state
    first, best = state.measured[0], min(state.measured, key=lambda figures: figures["perplexity"])
    return {
        "run": str(outcome.run),
        "best": str(outcome.best),
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "start": first,
        "measured": best,
    }


def _text(facts: dict[str, Any]) -> str:
    start, best = facts["start"], facts["measured"]
    return (
        f"{facts['best']}: perplexity {best['perplexity']:.3f} on held-out text "
        f"({start['perplexity']:.3f} before, teacher {best['teacher_perplexity']:.3f}), KL to the teacher "
        f"{best['kl']:.4f} ({start['kl']:.4f} before); "
        f"{facts['trained_tokens']} tokens in {facts['seconds']:.0f} s ({facts['tokens_per_second']:.0f}/s)"
    )
