"""How reports look in a terminal of 80 columns, whatever they are of."""

from rich import box
from rich.table import Table


def plain_table(title: str, *columns: str, rows: str = "", many: bool = False) -> Table:
    """A table with a first column of names, called ``rows``, and right-aligned figures.

    Args:
        many: columns may be too many for their headings: these wrap then, and names do not.
    """
    table = Table(
        box=box.SIMPLE,
        title=title,
        title_justify="left",
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column(rows, no_wrap=many)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=not many)
    return table


def share(value: float | None) -> str:
    """A share as a percentage, a dash for none."""
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
