"""``report.html`` of a run: loss, acceptance per position and block efficiency against trained tokens.

One file with its pictures inside (PNG, matplotlib). Reads ``metrics.jsonl`` only, so it can be made at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.jobs.page import Line, measurements, page, picture, running


def write_report(run: Path, about: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Args:
        run: folder with ``metrics.jsonl``.
        about: what to show as text: recipe, provenance, final figures.
    """
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    measured = measurements(lines)
    pictures = [_loss(steps), _alpha(steps, measured), _tau(measured)]
    path = run / "report.html"
    texts = dict(about) | {"measured": measured}
    path.write_text(page("Training run", pictures, texts), encoding="utf-8")
    return path


def _loss(steps: Sequence[Line]) -> Any:
    figure, axes = picture("Training loss", "nats per token")
    for index in range(len(steps[0]["losses"]) if steps else 0):
        smooth = running([line["losses"][index] for line in steps])
        axes.plot([line["tokens"] for line in steps], smooth, label=f"step {index + 1}")
    if steps:
        axes.legend()
    return figure


def _alpha(steps: Sequence[Line], measured: Sequence[Line]) -> Any:
    figure, axes = picture("Acceptance rate alpha per draft position", "alpha")
    for index in range(len(steps[0]["alphas"]) if steps else 0):
        smooth = running([line["alphas"][index] for line in steps])
        axes.plot([line["tokens"] for line in steps], smooth, alpha=0.4, label=f"training, step {index + 1}")
    for index in range(max((len(m["alpha_per_position"]) for m in measured), default=0)):
        points = [
            (m["tokens"], m["alpha_per_position"][index])
            for m in measured
            if index < len(m["alpha_per_position"])
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"held out, position {index + 1}")
    if steps or measured:
        axes.legend(fontsize="small")
    return figure


def _tau(measured: Sequence[Line]) -> Any:
    figure, axes = picture("Block efficiency tau, held-out prompts", "tokens per target forward")
    axes.plot([m["tokens"] for m in measured], [m["tau"] for m in measured], marker="o")
    return figure
