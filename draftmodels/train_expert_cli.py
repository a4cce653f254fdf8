"""``paceline train-expert``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.draftmodels.expert_finetune.recipe import load_recipe, recipe_keys, resumed_recipe
from paceline.draftmodels.jobs.interrupts import interruptible
from paceline.draftmodels.jobs.start import Wish, begin, pace, run_facts
from paceline.server.config.flags import with_flags


@with_flags(recipe_keys)
def train_expert(
    model: Annotated[
        str, typer.Argument(help="Small model to start from: catalog name, hf:ORG/NAME, folder or .gguf.")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="FILE", help="Recipe (TOML); flags win.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
    **flags: Any,
) -> None:
    """Make an expert for steering: supervised fine-tuning of a small model on prompts and answers.

    The best expert by loss on held-out examples is RUN/best, a plain checkpoint. Ctrl-C leaves a checkpoint; the same
    command with --resume goes on from it, as it does after a kill. Under torchrun the job is data parallel.
    """
    from paceline.draftmodels.expert_finetune.job import run_job
    from paceline.draftmodels.finetune.arithmetic import decided

    wish = Wish("model", model, output, recipe, resume, flags, load_recipe, resumed_recipe)
    chosen, ranks = begin(wish, decided)
    with interruptible():
        outcome = run_job(model, chosen, output, ranks)
    if ranks.is_main:
        typer.echo(json.dumps(_facts(outcome)) if as_json else _text(_facts(outcome)))


def _facts(outcome: Any) -> dict[str, Any]:
    measured = outcome.state.measured
    best = min(measured, key=lambda figures: figures["perplexity"])
    return {**run_facts(outcome), "start": measured[0], "measured": {**best, **outcome.answers}}


def _text(facts: dict[str, Any]) -> str:
    start, best = facts["start"], facts["measured"]
    matches = (
        f", {best['exact_match']:.1%} of {best['n_prompts']} answers exact" if "exact_match" in best else ""
    )
    return (
        f"{facts['best']}: loss {best['loss']:.4f} on held-out examples ({start['loss']:.4f} before), perplexity "
        f"{best['perplexity']:.3f} ({start['perplexity']:.3f} before){matches}; {pace(facts)}"
    )
