"""Commands of the offline half, registered under the entry-point group ``paceline.commands``.

Owns argument parsing and printing only. Heavy libraries are imported inside the commands, so that ``--help``
and the other commands stay quick.
"""

import json
from pathlib import Path
from typing import Annotated

import typer


def init_draft(
    target: Annotated[
        str, typer.Argument(help="Model to cut from: catalog name, hf:ORG/NAME, folder or .gguf.")
    ],
    layers: Annotated[str, typer.Option("--layers", help="Layers to keep, for example 0,1,28,29.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the draft to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
) -> None:
    """Cut an untrained draft out of a target: some of its layers, same tokenizer."""
    from paceline.draftmodels.cut import cut_draft, parse_layers

    report = cut_draft(target, parse_layers(layers), output, force=force)
    if as_json:
        facts = {
            "path": str(report.path),
            "base": report.base,
            "layers": list(report.layers),
            "parameters": report.parameters,
            "weights_bytes": report.weights_bytes,
        }
        typer.echo(json.dumps(facts))
    else:
        typer.echo(
            f"{report.path}: {len(report.layers)} layers of {report.base}, "
            f"{report.parameters / 1e6:.1f}M parameters, {report.weights_bytes / 1e6:.0f} MB bf16"
        )
