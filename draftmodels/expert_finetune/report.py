"""``report.html`` of an expert's run: loss, held-out loss and exact matches against trained tokens.

Reads ``metrics.jsonl`` only, so it can be made at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.jobs.page import Line, measurements, page, picture, running

#: The running mean is over about one in so many of a short run's steps.
_SMOOTHED_PARTS = 20


def write_report(run: Path, about: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Args:
        run: folder with ``metrics.jsonl``.
        about: what to show as text: recipe, provenance, final figures.
    """
    lines = read_metrics(run / "metrics.jsonl")
    measured = measurements(lines)
    pictures = [_training([line for line in lines if "loss" in line]), _held_out(measured)]
    answered = [figures for figures in measured if "exact_match" in figures]
    if answered:
        pictures.append(_matches(answered))
    path = run / "report.html"
    path.write_text(page("Expert run", pictures, dict(about) | {"measured": measured}), encoding="utf-8")
    return path


def _training(steps: Sequence[Line]) -> Any:
    figure, axes = picture("Training loss", "nats per learnt token")
    tokens, losses = [line["tokens"] for line in steps], [line["loss"] for line in steps]
    # An expert's job may have a few dozen steps: a mean over many of them would show a loss that is long gone.
    smooth = running(losses, min(1.0, max(0.05, _SMOOTHED_PARTS / max(len(losses), 1))))
    axes.plot(tokens, losses, alpha=0.3, label="steps")
    axes.plot(tokens, smooth, color="C0", label="running mean")
    axes.legend()
    return figure


def _held_out(measured: Sequence[Line]) -> Any:
    figure, axes = picture("Loss on held-out examples", "nats per learnt token")
    axes.plot([m["tokens"] for m in measured], [m["loss"] for m in measured], marker="o")
    return figure


def _matches(answered: Sequence[Line]) -> Any:
    figure, axes = picture("Exact matches of greedy answers, held-out prompts", "share")
    axes.plot([m["tokens"] for m in answered], [m["exact_match"] for m in answered], marker="o")
    axes.set_ylim(0, 1)
    return figure
