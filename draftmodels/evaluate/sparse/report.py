"""A student's measurement as one JSON object, as tables of 80 columns, as a picture, and as a manifest's entry."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from paceline.draftmodels.evaluate.sparse.losses import Losses
from paceline.draftmodels.evaluate.sparse.sizes import LayerSparsity, overall
from paceline.draftmodels.evaluate.sparse.speed import Speed
from paceline.draftmodels.evaluate.tables import plain_table, share
from paceline.server.models.manifest import Manifest
from paceline.server.models.student import KL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Losses with these equal replace each other in a manifest.
_SAME = ("dataset", "split", "weights")


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured.

    Attributes:
        speeds: empty without a whole round.
        bytes_per_forward: of parent and student.
    """

    losses: Losses
    speeds: Sequence[Speed]
    layers: list[LayerSparsity]
    bytes_per_forward: tuple[int, int]


def as_json(setting: Mapping[str, Any], found: Found, *, interrupted: bool) -> dict[str, Any]:
    """The whole report."""
    parent, student = found.bytes_per_forward
    return {
        "setting": dict(setting),
        "interrupted": interrupted,
        "losses": asdict(found.losses),
        "speed": [asdict(speed) for speed in found.speeds],
        "size": {
            "parent_bytes_per_forward": parent,
            "bytes_per_forward": student,
            "sparsity": overall(found.layers),
            "layers": [asdict(layer) for layer in found.layers],
        },
    }


def print_report(console: Console, setting: Mapping[str, Any], found: Found) -> None:
    """The report for people."""
    for line in _headline(setting):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in (_quality(found), _speed(found), _layers(found.layers)):
        console.print()
        console.print(table)
    console.print(
        f"\n{found.losses.task}: last words of {found.losses.n_task} sentences, given all text before; "
        "t/s: decoded tokens per second",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _headline(setting: Mapping[str, Any]) -> Iterator[str]:
    yield f"{setting['student']}, a student of {setting['parent']}"
    yield f"losses on {setting['dataset']} ({setting['split']}); speed on {setting['n_prompts']} prompts of "
    yield f"{setting['prompts']}, {setting['max_tokens']} tokens each, {setting['rounds']} alternating rounds, greedy"
    loaded = ", ".join(f"{who} {what}" for who, what in setting["weights_loaded"].items())
    yield f"weights {setting['weights']} ({loaded}), {setting['threads']} threads, {setting['cpu']}"


def _quality(found: Found) -> Table:
    own = found.losses
    parent_bytes, student_bytes = found.bytes_per_forward
    table = plain_table(f"quality, {own.n_tokens} tokens", "parent", "student")
    table.add_row("perplexity", f"{own.parent_perplexity:.2f}", f"{own.perplexity:.2f}")
    table.add_row("KL(parent || student), nats", "", f"{own.kl_nats:.4f}")
    table.add_row("top-1 agreement", "", f"{own.top1_agreement:.1%}")
    table.add_row(f"{own.task} accuracy", share(own.parent_task_accuracy), share(own.task_accuracy))
    table.add_row("MB per forward", f"{parent_bytes / 1e6:.1f}", f"{student_bytes / 1e6:.1f}")
    table.add_row("sparsity of the blocks", "", f"{overall(found.layers):.1%}")
    return table


def _speed(found: Found) -> Table:
    table = plain_table("speed", "t/s", "over parent", "rounds", "same text")
    for speed in found.speeds:
        rounds = " ".join(f"{rate:.0f}" for rate in speed.rounds)
        same = "" if speed.same_text is None else "{} of {}".format(*speed.same_text)
        table.add_row(
            speed.variant, f"{speed.tokens_per_second:.1f}", f"{speed.over_parent:.2f}x", rounds, same
        )
    if not found.speeds:
        table.add_row("not timed", "-", "-", "-", "-")
    return table


def _layers(layers: Sequence[LayerSparsity]) -> Table:
    names = list(layers[0].linears)
    table = plain_table("sparsity per layer", "all", *(name.removesuffix("_proj") for name in names))
    for cells, run in groupby(layers, lambda layer: _cells(layer, names)):
        alike = [layer.layer for layer in run]
        table.add_row(str(alike[0]) if len(alike) == 1 else f"{alike[0]}-{alike[-1]}", *cells)
    return table


def _cells(layer: LayerSparsity, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{share:.1%}" for share in (layer.sparsity, *(layer.linears[name] for name in names)))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: what was lost, what was gained, and where weights were left out."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    quality, speed, layers = figure.subplots(1, 3)
    _plot_quality(quality, report["losses"])
    names = [one["variant"] for one in report["speed"]]
    speed.bar(names, [one["tokens_per_second"] for one in report["speed"]])
    speed.set(title="decoding", ylabel="tokens per second")
    own = report["size"]["layers"]
    layers.bar([layer["layer"] for layer in own], [layer["sparsity"] for layer in own])
    layers.set(title="sparsity per layer", xlabel="layer", ylim=(0, 1))
    figure.suptitle(f"{report['setting']['student']}, a student of {report['setting']['parent']}")
    figure.savefig(path, format="png", dpi=100)


def _plot_quality(axes: "Axes", losses: Mapping[str, Any]) -> None:
    axes.bar(["parent", "student"], [losses["parent_perplexity"], losses["perplexity"]])
    axes.set(
        title=f"KL {losses['kl_nats']:.3f} nats, top-1 agreement {losses['top1_agreement']:.1%}",
        ylabel="perplexity",
    )


def recorded(manifest: Manifest, setting: Mapping[str, Any], found: Found) -> Manifest:
    """The manifest with these losses in ``measured``, in place of those of the same setting."""
    entry = _entry(setting, found)

    def replaces(old: Mapping[str, Any]) -> bool:
        return KL in old and all(old.get(key) == entry[key] for key in _SAME)

    kept = [old for old in manifest.measured if not replaces(old)]
    return replace(manifest, measured=(*kept, entry))


def _entry(setting: Mapping[str, Any], found: Found) -> dict[str, Any]:
    losses = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in asdict(found.losses).items()
    }
    speeds = {speed.variant: round(speed.over_parent, 4) for speed in found.speeds}
    return {
        "dataset": setting["dataset"],
        "split": setting["split"],
        "weights": setting["weights_loaded"]["student"],
        "parent_weights": setting["weights_loaded"]["parent"],
        **losses,
        "sparsity": round(overall(found.layers), 4),
        "speedup": speeds.get("student"),
    }
