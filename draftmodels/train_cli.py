"""``paceline train-draft``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.draftmodels.distill.config import load_recipe, recipe_keys, resumed_recipe
from paceline.draftmodels.jobs.interrupts import interruptible
from paceline.draftmodels.jobs.start import Wish, begin, pace, run_facts
from paceline.server.config.flags import with_flags


@with_flags(recipe_keys)
def train_draft(
    target: Annotated[
        str,
        typer.Argument(
            help="Model to draft for: catalog name, hf:ORG/NAME, folder, .gguf, or a configured FILE.toml[:NAME]."
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Recipe (TOML), or the name of a packaged one; flags win."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
    **flags: Any,
) -> None:
    """Train a draft for a target (DistillSpec), measured through the serving engine.

    The best draft by measured tau is RUN/best, ready for paceline serve --draft. Ctrl-C leaves a checkpoint; the same
    command with --resume goes on from it, as it does after a kill. Under torchrun the job is data parallel.
    """
    from paceline.draftmodels.distill.job import run_job

    wish = Wish("target", target, output, recipe, resume, flags, load_recipe, resumed_recipe)
    chosen, ranks = begin(wish)
    with interruptible():
        outcome = run_job(target, chosen, output, ranks)
    if ranks.is_main:
        typer.echo(json.dumps(_facts(outcome)) if as_json else _text(_facts(outcome)))


def _facts(outcome: Any) -> dict[str, Any]:
    state = outcome.state
    best = max(state.measured, key=lambda figures: figures["tau"])
    return {**run_facts(outcome), "labels_outside_vocabulary": state.labels_outside, "measured": best}


def _text(facts: dict[str, Any]) -> str:
    measured = facts["measured"]
    alphas = ", ".join(f"{alpha:.3f}" for alpha in measured["alpha_per_position"])
    return (
        f"{facts['best']}: tau {measured['tau']:.3f}, alpha per position {alphas} on held-out prompts; "
        f"{pace(facts)}"
    )
