"""``paceline sparsify``: arguments and printing only. Heavy libraries are imported inside the command."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.draftmodels.jobs.interrupts import interruptible
from paceline.draftmodels.prune.config import recipe_from, recipe_keys
from paceline.server.config.flags import with_flags

if TYPE_CHECKING:
    from paceline.draftmodels.prune.config import Recipe
    from paceline.draftmodels.prune.outcome import Outcome


@with_flags(recipe_keys)
def sparsify(
    target: Annotated[
        str, typer.Argument(help="Model to prune: catalog name, hf:ORG/NAME, folder or .gguf.")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
    **flags: Any,
) -> None:
    """Prune the linear layers of a model, one-shot (SparseGPT, Wanda or magnitude), and measure what it costs.

    Layer by layer in bounded memory. Perplexity before and after is measured on text that was not calibrated on; what
    was done and measured stands in DIR/paceline.json, error and sparsity of each layer in DIR/report.html.
    """
    recipe = recipe_from(flags)
    from paceline.draftmodels.prune.job import sparsify as prune
    from paceline.server.log import configure_logging

    configure_logging("text")
    with interruptible():
        outcome = prune(target, recipe, output, force=force)
    typer.echo(json.dumps(_facts(target, recipe, outcome)) if as_json else _text(recipe, outcome))


def _facts(target: str, recipe: "Recipe", outcome: "Outcome") -> dict[str, Any]:
    quality = outcome.quality
    return {
        "path": str(outcome.path),
        "base": target,
        "recipe": recipe.as_dict(),
        "sparsity": outcome.sparsity,
        "weights_bytes": outcome.weights_bytes,
        "measured_on": outcome.measured_on,
        "n_tokens": quality.positions,
        "perplexity": {"dense": quality.reference_perplexity, "pruned": quality.perplexity},
        "kl_nats": quality.kl_nats,
        "top1_agreement": quality.top1_agreement,
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
        "linears": [
            {"layer": f.layer, "linear": f.linear, "sparsity": f.sparsity, "error": f.error}
            for f in outcome.linears
        ],
    }


def _text(recipe: "Recipe", outcome: "Outcome") -> str:
    quality = outcome.quality
    return (
        f"{outcome.path}: {outcome.sparsity:.1%} of the linears' weights removed ({recipe.method}, {recipe.pattern}); "
        f"perplexity {quality.reference_perplexity:.2f} -> {quality.perplexity:.2f} on {quality.positions} tokens of "
        f"{outcome.measured_on}; {outcome.weights_bytes / 1e6:.0f} MB, {outcome.seconds['total']:.0f} s"
    )
