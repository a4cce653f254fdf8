"""What the side-by-side bench found out about the contenders, and how it is shown.

Owns all figures, the ratios, the share of the roofline reached, the tables and the JSON rows. It must not know how
contenders are run. Ratios pair the figures of one round; the median over rounds is shown. Prefill speed is prompt
tokens over TTFT, at one stream only: with more, prompts wait for each other.

How sure a ratio is says the standard error over *blocks* of rounds. A block has as many rounds as there are contenders,
in which each has had each place in the order (A B, B A), so that a machine that slows down favours nobody.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.table import Table

from paceline.clients.stats import LevelStats

OURS = "ours"
Figure = Callable[[LevelStats], float | None]


class Key(NamedTuple):
    """Who was measured at what; ``streams`` at once."""

    contender: str
    scenario: str
    streams: int


def speed(stats: LevelStats) -> float | None:
    """Generated tokens per second of all streams; None if nothing came."""
    return stats.output_tok_s or None


def prompt_tokens(stats: LevelStats) -> float | None:
    """Mean prompt length of the answered requests."""
    answered = stats.requests - stats.errors
    return stats.prompt_tokens / answered if answered and stats.prompt_tokens else None


def prefill_speed(stats: LevelStats) -> float | None:
    """Prompt tokens per second until the first token; None with several streams."""
    length, ttft_ms = prompt_tokens(stats), stats.ttft_ms.p50
    return length / ttft_ms * 1e3 if stats.level == "1" and length and ttft_ms else None


#: Compared with the best of each family: name in the report -> figure, more is better.
COMPARED: Mapping[str, Figure] = {"output_tok_s": speed, "prefill_tok_s": prefill_speed}


class Spread(NamedTuple):
    """A ratio over ``blocks`` blocks of rounds: mean and its standard error."""

    mean: float
    standard_error: float
    blocks: int


@dataclass(slots=True)
class Board:
    """Figures by key, one entry per round.

    Attributes:
        families: of each contender, ours in the order in which ratios are shown.
        ceilings_tok_s: tokens/s that one stream without speculation cannot exceed, by contender.
        skipped: who did not take part, or no longer, and why.
        busy_share: of the processors, taken by others while no contender ran.
    """

    families: dict[str, str] = field(default_factory=dict)
    figures: dict[Key, list[LevelStats]] = field(default_factory=dict)
    ceilings_tok_s: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    busy_share: float | None = None

    def add(self, key: Key, stats: LevelStats) -> None:
        """Note one round of one contender."""
        self.figures.setdefault(key, []).append(stats)

    @property
    def ours(self) -> list[str]:
        """Our contenders; the first is the one without speculation."""
        return [name for name, family in self.families.items() if family == OURS]

    def median(self, key: Key, figure: Figure) -> float | None:
        """Median over the rounds; None if nothing was measured."""
        values = [value for stats in self.figures.get(key, []) if (value := figure(stats)) is not None]
        return round(statistics.median(values), 2) if values else None

    def ratio(self, mine: Key, its: Key, figure: Figure = speed) -> float | None:
        """Median over rounds of our figure over the peer's; None where one of them has none."""
        pairs = zip(self.figures.get(mine, []), self.figures.get(its, []), strict=False)
        values = [(figure(a), figure(b)) for a, b in pairs]
        ratios = [a / b for a, b in values if a is not None and b]
        return round(statistics.median(ratios), 3) if ratios else None

    def spread(self, mine: Key, its: Key, figure: Figure = speed) -> Spread | None:
        """The ratio by blocks of rounds; None with fewer than two whole blocks, or where a round has no figure."""
        pairs = [
            (figure(a), figure(b))
            for a, b in zip(self.figures.get(mine, []), self.figures.get(its, []), strict=False)
        ]
        size = len(self.families)
        blocks = [pairs[at : at + size] for at in range(0, len(pairs) - size + 1, size)]
        ratios = [
            sum(a for a, _ in block if a) / sum(b for _, b in block if b)
            for block in blocks
            if all(a and b for a, b in block)
        ]
        if len(ratios) < max(len(blocks), 2):
            return None
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        return Spread(round(statistics.mean(ratios), 4), round(error, 4), len(ratios))

    def rows(self) -> list[dict[str, Any]]:
        """One record per key, as the table and the JSON line show it."""
        return [self._row(key) for key in self.figures]

    def _row(self, key: Key) -> dict[str, Any]:
        rounds = self.figures[key]
        tpot_ms = self.median(key, lambda stats: stats.tpot_ms.p50)
        ceiling = self.ceilings_tok_s.get(key.contender) if key.streams == 1 else None
        ratios = {
            our: self.ratio(key._replace(contender=our), key) for our in self.ours if key.contender != our
        }
        return {
            **key._asdict(),
            "family": self.families[key.contender],
            "output_tok_s": self.median(key, speed),
            "output_tok_s_rounds": [round(stats.output_tok_s, 2) for stats in rounds],
            "ttft_ms_p50": self.median(key, lambda stats: stats.ttft_ms.p50),
            "itl_ms_p50": self.median(key, lambda stats: stats.itl_ms.p50),
            "tpot_ms_p50": tpot_ms,
            "prompt_tokens": self.median(key, prompt_tokens),
            "prefill_tok_s": self.median(key, prefill_speed),
            "requests": sum(stats.requests for stats in rounds),
            "errors": sum(stats.errors for stats in rounds),
            "ceiling_tok_s": ceiling and round(ceiling, 1),
            "share_of_ceiling": round(1e3 / tpot_ms / ceiling, 3) if tpot_ms and ceiling else None,
            "ours_over_it": {our: ratio for our, ratio in ratios.items() if ratio is not None},
        }

    def ours_over_best(self) -> list[dict[str, Any]]:
        """Each of ours over the best of every family, per scenario, streams and figure.

        Which member of a family is best is decided by its median. Ours with speculation are also compared with ours
        without.
        """
        places = dict.fromkeys((key.scenario, key.streams) for key in self.figures)
        return [
            record
            for scenario, streams in places
            for our in self.ours
            for family in dict.fromkeys(self.families.values())
            for name, figure in COMPARED.items()
            if (record := self._versus(Key(our, scenario, streams), family, name, figure))
        ]

    def _versus(self, mine: Key, family: str, name: str, figure: Figure) -> dict[str, Any] | None:
        members = self.ours[:1] if family == OURS else [n for n, f in self.families.items() if f == family]
        known = [
            (median, key)
            for member in members
            if member != mine.contender
            and (median := self.median(key := mine._replace(contender=member), figure)) is not None
        ]
        if not known:
            return None
        best = max(known)[1]
        ratio = self.ratio(mine, best, figure)
        if ratio is None:
            return None
        spread = self.spread(mine, best, figure)
        return {
            **mine._asdict(),
            "figure": name,
            "over": family,
            "best": best.contender,
            "ratio": ratio,
            "spread": spread and spread._asdict(),
        }


def _cell(value: float | None, pattern: str = "{:.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The human-readable report, best tokens/s first within scenario and streams."""
    shown = Table(
        title="Medians over the rounds",
        caption="share: 1 / time per token, of the bandwidth ceiling without speculation; prefill: prompt "
        "tokens / TTFT",
    )
    for name in ("prompts", "streams", "contender", "tok/s", "TTFT ms", "ms/token"):
        shown.add_column(name, justify="left" if name in ("prompts", "contender") else "right")
    for name in ("prompt tokens", "prefill tok/s", "share", "errors"):
        shown.add_column(name, justify="right")
    order = {name: at for at, name in enumerate(dict.fromkeys(row["scenario"] for row in rows))}
    for row in sorted(
        rows, key=lambda row: (order[row["scenario"]], row["streams"], -(row["output_tok_s"] or 0))
    ):
        shown.add_row(
            row["scenario"],
            str(row["streams"]),
            row["contender"],
            _cell(row["output_tok_s"]),
            _cell(row["ttft_ms_p50"]),
            _cell(row["tpot_ms_p50"], "{:.2f}"),
            _cell(row["prompt_tokens"], "{:.0f}"),
            _cell(row["prefill_tok_s"], "{:.0f}"),
            _cell(row["share_of_ceiling"], "{:.0%}"),
            str(row["errors"]),
        )
    return shown


def ratio_table(versus: Sequence[Mapping[str, Any]]) -> Table:
    """Ours over the best of each family, as ``Board.ours_over_best`` lists it."""
    shown = Table(
        title="Ours over the best of each",
        caption="ratio: median of the rounds' own ratios; mean: of blocks in which each had each place, +- its "
        "standard error",
    )
    for name in ("prompts", "streams", "ours", "figure", "over", "ratio", "mean"):
        shown.add_column(name, justify="right" if name in ("streams", "ratio", "mean") else "left")
    for record in versus:
        figure = record["figure"].removesuffix("_tok_s").replace("output", "tok/s")
        place = (record["scenario"], str(record["streams"]), record["contender"], figure)
        spread = record["spread"]
        mean = f"{spread['mean']:.3f} +- {spread['standard_error']:.3f}" if spread else "-"
        shown.add_row(*place, record["best"], f"{record['ratio']:.2f}x", mean)
    return shown
