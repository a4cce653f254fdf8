"""The server's commands: ``serve``, ``pull``, ``models``, ``info``; registered as ``paceline.commands``.

Owns argument shapes and what is printed. The flags of ``serve`` are made from ``config.keys()``, so every
configuration key has one. Importing this module stays cheap: what is heavy is imported by the command that
needs it. Results go to stdout, progress and errors to stderr.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.server.config import keys, load_config
from paceline.server.config.flags import with_flags
from paceline.server.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration file (TOML).", show_default=False),
]


@with_flags(keys)
def serve(
    *,
    config: Config = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --log-format json.")] = False,
    **flags: Any,
) -> None:
    """Serve models through the OpenAI API.

    Every flag is also a key of the configuration file and an environment variable PACELINE_SECTION_KEY,
    such as PACELINE_SERVER_PORT. A flag wins over the variable, the variable over the file.
    """
    if json and flags["log_format"] not in (None, "json"):
        raise ConfigError(f"--json: contradicts --log-format {flags['log_format']}; keep one of the two")
    loaded = load_config(config, os.environ, flags | ({"log_format": "json"} if json else {}))
    from paceline.server.serving import serve as run

    raise typer.Exit(run(loaded))


def pull(
    model: Annotated[str, typer.Argument(help="Catalog name or hf:ORG/NAME[@REV].", metavar="MODEL")],
    *,
    json: Json = False,
) -> None:
    """Fetch a model into the cache and verify it."""
    from paceline.server.log import configure_logging
    from paceline.server.models import sources

    configure_logging("text")
    path = sources.resolve(model)
    typer.echo(_dumps({"model": model, "path": str(path)}) if json else str(path))


def models(*, json: Json = False) -> None:
    """List the models known by name and which of them are fetched."""
    from paceline.server.models import sources
    from paceline.server.models.catalog import catalog

    known = [
        {
            "name": entry.name,
            "description": entry.description,
            "size_bytes": entry.size_bytes,
            "sha256": entry.sha256,
            "licence": entry.licence,
            "path": None if (path := sources.cached(entry.name)) is None else str(path),
        }
        for entry in catalog().values()
    ]
    typer.echo(_dumps(known) if json else "\n".join(map(_model_line, known)))


def _model_line(known: Mapping[str, Any]) -> str:
    state = known["path"] or "not fetched"
    return f"{known['name']:<28} {known['size_bytes'] / 1e6:>6.0f} MB  {known['description']}\n    {state}"


def info(*, json: Json = False) -> None:
    """Show versions, CPU features, devices and what "auto" means here."""
    from paceline.server.report import lines, report

    facts = report()
    typer.echo(_dumps(facts) if json else "\n".join(lines(facts)))


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2)
