"""The page of a job's report: one HTML file with its pictures inside (PNG, matplotlib)."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

#: One object of ``metrics.jsonl``.
Line = Mapping[str, Any]


def picture(title: str, y_label: str) -> tuple[Any, Any]:
    """An empty (figure, axes) over trained tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="trained tokens", ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def running(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Running mean, as single batches are noisy."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else result[-1] + weight * (value - result[-1]))
    return result


def measurements(lines: Sequence[Line]) -> list[Line]:
    """Those of a run, oldest first; one that was repeated after a kill counts once."""
    return list({line["step"]: line["measured"] for line in lines if "measured" in line}.values())


def page(title: str, figures: Sequence[Any], texts: Mapping[str, Any], table: str = "") -> str:
    """HTML with pictures above texts.

    Args:
        texts: heading -> what is shown as JSON.
        table: HTML between the two.
    """
    images = "\n".join(f'<img alt="plot" src="data:image/png;base64,{_png(figure)}">' for figure in figures)
    written = "\n".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(json.dumps(value, indent=2))}</pre>"
        for name, value in texts.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Paceline {title.lower()}</title>'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:auto}pre{overflow:auto}"
        "td,th{text-align:right;padding:0 .5em;font-size:small}</style></head>"
        f"<body><h1>{title}</h1>\n{images}\n{table}\n{written}</body></html>\n"
    )


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
