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


def export(
    artifact: Annotated[Path, typer.Argument(help="Folder of a draft in Paceline's native form.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Write a plain bf16 checkpoint that other loaders take.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Model it was made for, if not found under the name in paceline.json."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")] = False,
) -> None:
    """Check a draft in native form and copy it, or turn it into a plain checkpoint."""
    from paceline.draftmodels.export import export_artifact

    report = export_artifact(artifact, output, standalone=standalone, target=target, force=force)
    if as_json:
        facts = {
            "path": str(report.path),
            "form": report.form,
            "base": report.base,
            "weights_bytes": report.weights_bytes,
        }
        typer.echo(json.dumps(facts))
    else:
        typer.echo(
            f"{report.path}: {report.form} form, for {report.base}, {report.weights_bytes / 1e6:.0f} MB"
        )
