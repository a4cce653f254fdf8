"""``report.html`` of a recovery run: parts of the loss, perplexity and KL against trained tokens.

Reads ``metrics.jsonl`` only, so it can be made at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.draftmodels.jobs.metrics import read_metrics
from paceline.draftmodels.jobs.page import Line, measurements, page, picture, running

_NAMES = {"ce": "cross entropy", "kl": "KL(teacher || student)", "sq": "SquareHead"}


def write_report(run: Path, about: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Args:
        run: folder with ``metrics.jsonl``.
        about: what to show as text: recipe, provenance.
    """
    lines = read_metrics(run / "metrics.jsonl")
    measured = measurements(lines)
    pictures = [_losses([line for line in lines if "loss" in line]), _perplexity(measured), _kl(measured)]
    path = run / "report.html"
    texts = dict(about) | {"measured": measured}
    path.write_text(page("Recovery run", pictures, texts), encoding="utf-8")
    return path


def _losses(steps: Sequence[Line]) -> Any:
    figure, axes = picture("Parts of the training loss, before their weights", "nats per token; ratio")
    for name, label in _NAMES.items():
        points = [(line["tokens"], line[name]) for line in steps if name in line]
        if points:
            axes.plot([tokens for tokens, _ in points], running([value for _, value in points]), label=label)
    if steps:
        axes.legend()
    return figure


def _perplexity(measured: Sequence[Line]) -> Any:
    figure, axes = picture("Perplexity on held-out text", "perplexity")
    axes.plot(
        [m["tokens"] for m in measured], [m["perplexity"] for m in measured], marker="o", label="student"
    )
    if measured:
        axes.axhline(measured[0]["teacher_perplexity"], linestyle="--", color="grey", label="teacher")
        axes.legend()
    return figure


def _kl(measured: Sequence[Line]) -> Any:
    figure, axes = picture("KL(teacher || student) on held-out text", "nats per token")
    axes.plot([m["tokens"] for m in measured], [m["kl"] for m in measured], marker="o")
    return figure
