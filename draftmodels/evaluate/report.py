"""A measurement as one JSON object, as a table of 80 columns, and as files."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.draftmodels.evaluate.figures import Against, Group, Result
from paceline.draftmodels.evaluate.setting import headline
from paceline.draftmodels.evaluate.tables import number, plain_table
from paceline.server.errors import ConfigError
from paceline.server.models.verified import write_text_atomic

REPORT, PLOT = "report.json", "report.png"
_LEGEND = """
n: prompts; tau: tokens per target forward; tau~: the same by the formula, from alpha
accepted: of the drafted tokens; off, on t/s: tokens per second without and with speculation"""


def as_json(setting: Mapping[str, Any], results: Sequence[Result], *, interrupted: bool) -> dict[str, Any]:
    """The whole report; ``temperatures`` holds those whose acceptance is measured."""
    return {
        "setting": dict(setting),
        "interrupted": interrupted,
        "temperatures": [_result(result) for result in results],
    }


def _result(result: Result) -> dict[str, Any]:
    same = result.same_text
    return {
        "temperature": result.temperature,
        "total": _group(result.total),
        "categories": {name: _group(group) for name, group in result.categories.items()},
        "same_text": None if same is None else {"equal": same[0], "compared": same[1]},
        "against": None if result.against is None else _against(result.against),
    }


def _against(against: Against) -> dict[str, Any]:
    return asdict(against) | {"group": _group(against.group)}


def _group(group: Group) -> dict[str, Any]:
    return asdict(group.acceptance) | {"speed": None if group.speed is None else asdict(group.speed)}


def print_report(console: Console, setting: Mapping[str, Any], results: Sequence[Result]) -> None:
    """The report for people."""
    for line in headline(setting):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for result in results:
        console.print()
        console.print(_table(result))
        for line in _details(result):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_LEGEND, markup=False, highlight=False, soft_wrap=True)


def _table(result: Result) -> Table:
    """One row per category, one for everything, and one for everything with the other draft."""
    names = ("n", "tokens", "alpha", "tau", "tau~", "accepted", "off t/s", "on t/s", "speed-up")
    table = plain_table(f"T = {result.temperature:g}", *names, rows="category")
    shown = result.categories if len(result.categories) > 1 else {}
    for name, group in shown.items():
        table.add_row(name, *_cells(group))
    if shown:
        table.add_section()
    table.add_row("total", *_cells(result.total))
    if result.against is not None:
        table.add_row("against", *_cells(result.against.group))
    return table


def _cells(group: Group) -> Iterator[str]:
    own, speed = group.acceptance, group.speed
    yield from (str(own.n_prompts), str(own.n_tokens))
    yield from (number(own.alpha, 3), number(own.tau, 2), number(own.tau_formula, 2))
    yield "-" if own.draft_acceptance_rate is None else f"{own.draft_acceptance_rate:.0%}"
    if speed is None:
        yield from ("-", "-", "-")
        return
    yield from (
        f"{speed.tokens_per_second_without:.1f}",
        f"{speed.tokens_per_second:.1f}",
        f"{speed.speedup:.2f}x",
    )


def _details(result: Result) -> Iterator[str]:
    own = result.total.acceptance
    if result.against is not None and result.against.ratio is not None:
        yield f"  faster than the other draft:       {_ratio(result.against)}"
    yield f"  accepted / examined, per position: {_numbers(own.alpha_per_position)}"
    if result.temperature:
        yield f"  sum min(p, q), per position:       {_numbers(own.overlap_per_position)}"
    counts = " ".join(f"{n}:{count}" for n, count in enumerate(own.acceptance_histogram))
    yield f"  blocks by accepted tokens:         {counts}"
    if len(own.drafted_by_source) > 1:
        sources = ", ".join(f"{name} {count}" for name, count in own.drafted_by_source.items())
        yield f"  draft tokens by source:            {sources}"
    if result.same_text is not None:
        yield f"  same text with and without:        {result.same_text[0]} of {result.same_text[1]}"


def _ratio(against: Against) -> str:
    error = "" if against.standard_error is None else f" +- {against.standard_error:.3f}"
    rounds = " ".join(f"{ratio:.2f}" for ratio in against.ratios)
    return f"{number(against.ratio, 3)}x{error} (rounds {rounds})"


def _numbers(values: Sequence[float | None]) -> str:
    return " ".join(number(value, 3) for value in values)


def check_folder(folder: Path) -> None:
    """Make the output folder before anything is measured.

    Raises:
        ConfigError: it holds a report already, or cannot be written.
    """
    if (folder / REPORT).exists():
        raise ConfigError(f"--output: {folder} holds a report already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output: {folder} cannot be made: {error.strerror}; name another folder"
        ) from error


def write(
    folder: Path,
    report: Mapping[str, Any],
    plot: Callable[[Mapping[str, Any], Path], None],
    lines: Mapping[str, Iterable[Mapping[str, Any]]] = MappingProxyType({}),
) -> None:
    """Plot, further files and report, the report last: where it is, all is there.

    Args:
        plot: draws the report into a file.
        lines: objects of JSON Lines, by the file's name.

    Raises:
        ConfigError: nothing can be written.
    """
    try:
        plot(report, folder / PLOT)
        for name, objects in lines.items():
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
            write_text_atomic(folder / name, text)
        write_text_atomic(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written: {error.strerror}") from error
