"""``paceline train-draft``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.draftmodels.distill.config import load_recipe, recipe_keys, resumed_recipe
from paceline.draftmodels.jobs.recipes import check_new_run, save_start, saved_start
from paceline.server.config.flags import with_flags
from paceline.server.errors import ConfigError


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
    if resume and recipe is not None:
        raise ConfigError("--recipe: a resumed run keeps the recipe that it was started with; leave it out")
    from paceline.draftmodels.distill.job import run_job
    from paceline.draftmodels.jobs.ranks import Ranks
    from paceline.server.log import configure_logging

    if resume:
        started_for, saved = saved_start(output, "target")
        if target != started_for:
            raise ConfigError(f"TARGET: {output} was started for {started_for}, not {target}")
        chosen = resumed_recipe(saved, flags, str(output))
    else:
        chosen = load_recipe(recipe, flags)
    configure_logging("text")
    ranks = Ranks.from_environment()
    if ranks.is_main:
        if not resume:
            check_new_run(output)
        save_start(output, "target", target, asdict(chosen))
    ranks.from_main(None)  # the others wait until the folder is there
    outcome = run_job(target, chosen, output, ranks)
    if ranks.is_main:
        typer.echo(json.dumps(_facts(outcome)) if as_json else _text(_facts(outcome)))


def _facts(outcome: Any) -> dict[str, Any]:
    state = outcome.state
    best = max(state.measured, key=lambda figures: figures["tau"])
    return {
        "run": str(outcome.run),
        "best": str(outcome.best),
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "labels_outside_vocabulary": state.labels_outside,
        "measured": best,
    }


def _text(facts: dict[str, Any]) -> str:
    measured = facts["measured"]
    alphas = ", ".join(f"{alpha:.3f}" for alpha in measured["alpha_per_position"])
    return (
        f"{facts['best']}: tau {measured['tau']:.3f}, alpha per position {alphas} on held-out prompts; "
        f"{facts['trained_tokens']} tokens in {facts['seconds']:.0f} s ({facts['tokens_per_second']:.0f}/s)"
    )
