"""One HTML page with its pictures inside: what jobs leave behind to be looked at."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any


def page(title: str, figures: Sequence[Any], texts: Mapping[str, Any], table: str = "") -> str:
    """The page.

    Args:
        figures: of matplotlib; shown first, as PNG.
        texts: heading -> what to show as JSON.
        table: HTML between pictures and texts.
    """
    images = "\n".join(f'<img alt="plot" src="data:image/png;base64,{_png(figure)}">' for figure in figures)
    sections = "\n".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(json.dumps(value, indent=2))}</pre>"
        for name, value in texts.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Paceline: {html.escape(title)}</title>'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:auto}pre{overflow:auto}"
        "td,th{text-align:right;padding:0 .5em;font-size:small}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>\n{images}\n{table}\n{sections}</body></html>\n"
    )


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
