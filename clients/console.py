"""The one ``paceline`` script: finds the subcommands and runs the chosen one.

Every component registers its commands in the entry-point group ``paceline.commands``, so no component imports
another to be reachable, and the base install (client only) has this file alone. Only the chosen command is
imported; the help of the others is read from their source. Exit codes: 0 done, 1 failed, 2 bad usage or
configuration, 130 interrupted. Errors of ours are known by their ``exit_code`` attribute and print one line.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "paceline.commands"
INTERRUPTED = 130

_CONTEXT = {"max_content_width": 100}

#: Extra that installs a component; others are called like the component.
_EXTRAS = {"clients": "bench", "draftmodels": "train"}


class CommandGroup(TyperGroup):
    """All registered commands: listed from their source, imported when chosen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, point in _points().items():
            self.add_command(TyperCommand(name=name, help=_summary(point)), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The chosen command, imported; the stub that stood for it in the help is not run."""
        name, stub, rest = super().resolve_command(ctx, args)
        ctx.invoked_subcommand = name
        return name, stub if name is None else _load(_points()[name]), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a missing extra and Ctrl-C end it with one line at most."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except ModuleNotFoundError as error:
            name = str(ctx.invoked_subcommand)
            extra = _extra_with(error.name or "", _points()[name]) if name in _points() else None
            if extra is None:
                raise
            _complain(f"paceline {name} needs the {extra} extra: pip install 'paceline[{extra}]'")
            raise SystemExit(1) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``paceline`` with these arguments (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = typer.main.get_command(_app()).main(
            arguments or ["--help"], prog_name="paceline", standalone_mode=False
        )
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if not isinstance(exit_code, int):
            raise
        _complain(_line(error, arguments))
        return exit_code
    return code if isinstance(code, int) else 0


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=CommandGroup, add_completion=False, rich_markup_mode=None, context_settings=_CONTEXT
    )

    @app.callback()
    def paceline(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
        ] = False,
    ) -> None:
        """Serve language models faster, through the OpenAI API."""

    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paceline {version('paceline')}")
        raise typer.Exit


def _line(error: Exception, arguments: Sequence[str]) -> str:
    """One line for an error of ours, or for the command line's own complaint about its arguments."""
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return f"paceline: {error}"
    context = getattr(error, "ctx", None)
    # The option parser's own complaints have no context: it does not know whose options it reads.
    path = context.command_path if context is not None else " ".join(["paceline", *arguments[:1]])
    message = " ".join(format_message().split())
    return f"{path}: {message} (see {path} --help)"


def _complain(line: str) -> None:
    typer.echo(line, err=True)


@cache
def _points() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def _load(point: EntryPoint) -> Any:
    return _command(point.name, point.load())


def _command(name: str, loaded: Any) -> Any:
    """The command that an entry point stands for: a function, a typer application or a ready command."""
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    if hasattr(loaded, "make_context"):
        return loaded
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, context_settings=_CONTEXT)(loaded)
    return typer.main.get_command(app)


def _summary(point: EntryPoint) -> str:
    """First line of a command's docstring, read without importing its module."""
    spec = importlib.util.find_spec(point.module)
    if spec is None or spec.origin is None:
        return "Not installed."
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == point.attr)
    return (ast.get_docstring(next(functions, tree)) or "").partition("\n")[0]


def _extra_with(module: str, point: EntryPoint) -> str | None:
    """The extra that installs a missing module; None if no extra does, so that the error is our own."""
    wanted = _normal(module.partition(".")[0])
    extras = []
    for line in requires("paceline") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name and _normal(name[0]) == wanted:
            extras.append(extra[1])
    component = point.module.split(".")[1]
    own = _EXTRAS.get(component, component)
    return own if own in extras else next(iter(extras), None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
