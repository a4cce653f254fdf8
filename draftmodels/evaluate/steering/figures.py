"""From answers to figures: task scores, how much of the way to the tuned base they go, and speed. Pure Python.

The gap closed is (steered - base) / (tuned - base) as in proxy-tuning (arXiv:2401.08565), per task and of the mean over
the tasks; where the tuned base is no better than the base there is no gap, and the figure is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from paceline.draftmodels.evaluate.answers import Answer, Pass
from paceline.draftmodels.evaluate.figures import Acceptance, acceptance
from paceline.draftmodels.evaluate.steering.outcome import Kind, Outcome
from paceline.draftmodels.evaluate.steering.plan import TUNED, Plan
from paceline.draftmodels.evaluate.steering.tasks import Question, is_right
from paceline.draftmodels.evaluate.steering.variants import BASE_LABEL, Variant

_Rounds = Sequence[Mapping[tuple[str, Kind], Pass]]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many questions of a task were answered rightly; ``gap_closed`` only of the sweep."""

    n: int
    right: int
    gap_closed: float | None = None

    @property
    def share(self) -> float:
        """Of right answers."""
        return self.right / self.n


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, medians over the rounds.

    Attributes:
        streams: requests in flight. With one, tokens after an answer's first and the time from it to the last count;
            with more, all tokens and the wall clock, prompts included.
        on, off: with and without speculation; ``on`` None without a draft.
        speedup: median over the rounds of on / off.
        rounds: (on, off) of each.
        same_text: (answers that were the same with and without, answers), first round.
    """

    streams: int
    on: float | None
    off: float | None
    speedup: float | None
    rounds: tuple[tuple[float | None, float | None], ...]
    same_text: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One variant.

    Attributes:
        strength: None beside the sweep.
        tasks: scores by task. ``mean``: of their shares, each task counting once.
        gap_closed: of the mean; None beside the sweep, and where there is no gap.
        argmax_changed: share of the answers' tokens that the base, given all before them, would not have chosen; only
            of the sweep.
        n_tokens: of all answers. ``cut``: answers that --max-tokens ended.
        acceptance: of drafted tokens; None if nothing was drafted.
        speeds: empty without a whole round.
    """

    label: str
    model: str
    strength: float | None
    tasks: dict[str, TaskScore]
    mean: float
    gap_closed: float | None
    argmax_changed: float | None
    n_tokens: int
    cut: int
    acceptance: Acceptance | None
    speeds: tuple[Speed, ...]


def summarize(plan: Plan, questions: Sequence[Question], outcome: Outcome) -> list[Row]:
    """A row for every variant whose answers are all there."""
    rows: list[Row] = []
    for variant in outcome.variants:
        label = BASE_LABEL if variant.is_base else variant.label
        if label in outcome.scored:
            rows.append(_row(plan, questions, outcome, variant, label))
    return _with_gaps(rows)


def _row(plan: Plan, questions: Sequence[Question], outcome: Outcome, variant: Variant, label: str) -> Row:
    answers = outcome.scored[label].answers
    tasks = _scores(plan, questions, answers)
    drafted = any(answer.blocks for answer in answers)
    length = plan.steered.speculation.max_draft_tokens
    return Row(
        label=variant.label,
        model=variant.model,
        strength=variant.strength,
        tasks=tasks,
        mean=mean(score.share for score in tasks.values()),
        gap_closed=None,
        argmax_changed=0.0 if variant.is_base else _changed(outcome, variant),
        n_tokens=sum(len(answer.tokens) for answer in answers),
        cut=sum(len(answer.tokens) == plan.max_tokens for answer in answers),
        acceptance=acceptance(answers, length) if drafted else None,
        speeds=_speeds(label, outcome.rounds),
    )


def _scores(plan: Plan, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, TaskScore]:
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.task, []).append(is_right(answer.text, question.answer, plan.score))
    return {task: TaskScore(len(own), sum(own)) for task, own in right.items()}


def _changed(outcome: Outcome, variant: Variant) -> float | None:
    counted = outcome.changed.get(variant.label)
    return counted.changed / counted.tokens if counted is not None and counted.tokens else None


def _with_gaps(rows: Sequence[Row]) -> list[Row]:
    by_label = {row.label: row for row in rows}
    base, tuned = by_label.get(BASE_LABEL), by_label.get(TUNED)
    if base is None or tuned is None:
        return list(rows)
    return [row if row.strength is None else _with_gap(row, base, tuned) for row in rows]


def _with_gap(row: Row, base: Row, tuned: Row) -> Row:
    tasks = {
        task: replace(
            score, gap_closed=gap_closed(score.share, base.tasks[task].share, tuned.tasks[task].share)
        )
        for task, score in row.tasks.items()
    }
    return replace(row, tasks=tasks, gap_closed=gap_closed(row.mean, base.mean, tuned.mean))


def gap_closed(steered: float, base: float, tuned: float) -> float | None:
    """(steered - base) / (tuned - base); None if tuning has won nothing."""
    return (steered - base) / (tuned - base) if tuned > base else None


def _speeds(label: str, rounds: _Rounds) -> tuple[Speed, ...]:
    streams = dict.fromkeys(kind.streams for done in rounds[:1] for _, kind in done)
    return tuple(_speed(label, count, rounds) for count in sorted(streams))


def _speed(label: str, streams: int, rounds: _Rounds) -> Speed:
    on, off = (label, Kind(streams, True)), (label, Kind(streams, False))
    rates = tuple((_rate(done.get(on), streams), _rate(done[off], streams)) for done in rounds)
    ratios = [a / b for a, b in rates if a is not None and b is not None]
    same = None if on not in rounds[0] else _same_text(rounds[0][on], rounds[0][off])
    return Speed(
        streams,
        _median([a for a, _ in rates]),
        _median([b for _, b in rates]),
        _median(ratios),
        rates,
        same,
    )


def _rate(one: Pass | None, streams: int) -> float | None:
    """Tokens per second; None where nothing was timed."""
    if one is None:
        return None
    if streams > 1:
        return sum(len(answer.tokens) for answer in one.answers) / one.seconds
    seconds = sum(answer.decode_seconds for answer in one.answers)
    return sum(answer.decoded for answer in one.answers) / seconds if seconds else None


def _same_text(on: Pass, off: Pass) -> tuple[int, int]:
    pairs = list(zip(on.answers, off.answers, strict=True))
    return sum(a.tokens == b.tokens for a, b in pairs), len(pairs)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
