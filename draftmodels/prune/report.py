"""``report.html`` of a pruned model: perplexities; error and sparsity of every linear as pictures and as a table."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.draftmodels.jobs.page import page
from paceline.draftmodels.prune.inputs import LINEARS
from paceline.draftmodels.prune.outcome import Outcome
from paceline.draftmodels.prune.walk import LinearFigures


def write_report(folder: Path, outcome: Outcome, about: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into the artifact's folder and return its path.

    Args:
        about: what else to show as text.
    """
    pictures = [
        _picture(
            outcome.linears,
            "Output error by layer",
            "||(W - W') X||^2 / ||W X||^2",
            lambda f: f.error,
            log=True,
        ),
        _picture(outcome.linears, "Sparsity by layer", "share of weights removed", lambda f: f.sparsity),
    ]
    quality = outcome.quality
    measured = {
        "text": outcome.measured_on,
        "tokens": quality.positions,
        "perplexity": {"dense": quality.reference_perplexity, "pruned": quality.perplexity},
        "kl_nats": quality.kl_nats,
        "top1_agreement": quality.top1_agreement,
    }
    texts = {**about, "measured": measured, "seconds": dict(outcome.seconds)}
    path = folder / "report.html"
    path.write_text(page("Pruned model", pictures, texts, _table(outcome.linears)), encoding="utf-8")
    return path


def _picture(
    figures: Sequence[LinearFigures],
    title: str,
    label: str,
    value: Callable[[LinearFigures], float],
    *,
    log: bool = False,
) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="layer", ylabel=label)
    for linear in LINEARS:
        points = [(f.layer, value(f)) for f in figures if f.linear == linear]
        axes.plot(*zip(*points, strict=True), marker=".", label=linear)
    if log and all(value(f) > 0 for f in figures):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    return figure


def _table(figures: Sequence[LinearFigures]) -> str:
    by_place = {(f.layer, f.linear): f for f in figures}
    layers = sorted({f.layer for f in figures})
    head = "".join(f"<th>{html.escape(name.partition('.')[2])}</th>" for name in LINEARS)
    rows = "\n".join(
        f"<tr><td>{layer}</td>"
        + "".join(
            f"<td>{by_place[layer, n].error:.4f} at {by_place[layer, n].sparsity:.1%}</td>" for n in LINEARS
        )
        + "</tr>"
        for layer in layers
    )
    return f"<h2>Output error at sparsity</h2><table><tr><th>layer</th>{head}</tr>\n{rows}</table>"
