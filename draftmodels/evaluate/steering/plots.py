"""The picture of a steered model's report: score, changed tokens and speed against the strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"base": "grey", "expert": "tab:orange", "tuned": "tab:green"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG; what does not sweep is a horizontal line."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    setting, rows = report["setting"], report["variants"]
    sweep = [row for row in rows if row["strength"] is not None]
    beside = [row for row in rows if row["strength"] is None]
    name = "beta" if setting["mode"] == "amplify" else "alpha"
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    scores, changed, speed = figure.subplots(1, 3)
    _scores(scores, sweep, beside)
    _line(changed, sweep, [row["argmax_changed"] for row in sweep], "steered")
    _speed(speed, sweep, beside)
    scores.set(title=f"right answers ({setting['score']})", xlabel=name, ylabel="share")
    changed.set(title="tokens that the base would not have chosen", xlabel=name, ylabel="share")
    speed.set(title="decoding, one stream", xlabel=name, ylabel="tokens per second")
    for axes in (scores, changed, speed):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    figure.suptitle(
        f"{setting['model']}: {setting['target']} steered by {setting['pair']} ({setting['mode']}); "
        f"{setting['dataset']}, {setting['n_prompts']} questions, draft {setting['draft'] or 'none'}"
    )
    figure.savefig(path, format="png", dpi=100)


def _scores(axes: "Axes", sweep: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]) -> None:
    tasks = list(sweep[0]["tasks"]) if sweep else []
    for task in tasks if len(tasks) > 1 else []:
        _line(axes, sweep, [row["tasks"][task]["share"] for row in sweep], task, thin=True)
    _line(axes, sweep, [row["mean"] for row in sweep], "steered")
    for row in beside:
        axes.axhline(row["mean"], color=_COLOURS[row["label"]], linestyle="--", label=row["label"])


def _speed(axes: "Axes", sweep: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]) -> None:
    for key, label in (("on", "steered, speculating"), ("off", "steered, without")):
        _line(axes, sweep, [_single(row, key) for row in sweep], label)
    for row in beside:
        rates = [rate for key in ("on", "off") if (rate := _single(row, key)) is not None]
        if rates:
            axes.axhline(max(rates), color=_COLOURS[row["label"]], linestyle="--", label=row["label"])


def _single(row: Mapping[str, Any], key: str) -> float | None:
    return next((speed[key] for speed in row["speeds"] if speed["streams"] == 1), None)


def _line(
    axes: "Axes",
    sweep: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    label: str,
    *,
    thin: bool = False,
) -> None:
    """Draw what is there."""
    points = [(row["strength"], value) for row, value in zip(sweep, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=label, linewidth=0.8 if thin else 2)
