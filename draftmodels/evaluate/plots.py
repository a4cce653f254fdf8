"""The picture of a report: acceptance per position, accepted tokens per block, speed-up per category."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with one panel per figure and one series per temperature.

    Args:
        report: from ``report.as_json``, with at least one temperature.
    """
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    setting, results = report["setting"], report["temperatures"]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    positions, blocks, speeds = figure.subplots(1, 3)
    for index, result in enumerate(results):
        shift = _Shift(index, len(results))
        _positions(positions, result)
        _blocks(blocks, result, shift)
        _speeds(speeds, result, shift)
    positions.set(title="acceptance per draft position", xlabel="draft position", ylim=(0, 1.02))
    positions.set_xticks(range(1, setting["max_draft_tokens"] + 1))
    blocks.set(title="blocks by accepted tokens", xlabel="accepted tokens", ylabel="share of blocks")
    blocks.set_xticks(range(setting["max_draft_tokens"] + 1))
    speeds.set(title="speed-up over no speculation")
    speeds.axhline(1, color="grey", linewidth=1)
    for axes in (positions, blocks):
        axes.legend()
    figure.suptitle(
        f"{setting['target']}, draft {setting['draft']}: {setting['dataset']}, {setting['n_prompts']} prompts, "
        f"{setting['max_draft_tokens']} draft tokens ({setting['policy']}), {setting['streams']} stream(s)"
    )
    figure.savefig(path, format="png", dpi=100)


class _Shift:
    """Where one temperature's bars stand beside the others'."""

    def __init__(self, index: int, count: int) -> None:
        self.width = 0.8 / count
        self._offset = (index - (count - 1) / 2) * self.width

    def places(self, count: int) -> list[float]:
        return [i + self._offset for i in range(count)]


def _positions(axes: "Axes", result: Mapping[str, Any]) -> None:
    total, label = result["total"], f"T = {result['temperature']:g}"
    line = _line(axes, total["alpha_per_position"], f"{label}, accepted / examined", "-")
    if result["temperature"]:
        _line(axes, total["overlap_per_position"], f"{label}, sum min(p, q)", "--", color=line)
    if result["against"]:
        other = result["against"]["group"]["alpha_per_position"]
        _line(axes, other, f"{label}, the other draft", ":", color=line)


def _line(axes: "Axes", values: Sequence[float | None], label: str, style: str, color: Any = None) -> Any:
    """Draw what is there and return the colour it got."""
    known = [(i, value) for i, value in enumerate(values, 1) if value is not None]
    (line,) = axes.plot(
        [i for i, _ in known], [value for _, value in known], style, marker="o", label=label, color=color
    )
    return line.get_color()


def _blocks(axes: "Axes", result: Mapping[str, Any], shift: _Shift) -> None:
    counts = result["total"]["acceptance_histogram"]
    total = max(1, sum(counts))
    heights = [count / total for count in counts]
    axes.bar(shift.places(len(counts)), heights, shift.width, label=f"T = {result['temperature']:g}")


def _speeds(axes: "Axes", result: Mapping[str, Any], shift: _Shift) -> None:
    groups = {**result["categories"], "total": result["total"]}
    speedups = [group["speed"] and group["speed"]["speedup"] for group in groups.values()]
    if None in speedups:  # no timed round was finished
        return
    axes.bar(shift.places(len(groups)), speedups, shift.width)
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
