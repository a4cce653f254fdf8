"""A steered model's measurement as one JSON object, and as tables of 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.draftmodels.evaluate.setting import cpu_name
from paceline.draftmodels.evaluate.steering.figures import Row, Speed
from paceline.draftmodels.evaluate.steering.outcome import Outcome
from paceline.draftmodels.evaluate.steering.plan import STEERED, TUNED, Plan
from paceline.draftmodels.evaluate.steering.tasks import Question
from paceline.draftmodels.evaluate.steering.variants import BASE_LABEL
from paceline.draftmodels.evaluate.tables import number, plain_table, share
from paceline.draftmodels.provenance import provenance

_LEGEND = """
changed: answers' tokens that the base would not have chosen there; cut: answers that --max-tokens ended
tau: tokens per target forward; accepted: of the drafted tokens; 1 off, 1 on, ...: so many requests in flight, without
and with speculation. One: decoded tokens per second; more: all tokens per second of wall clock, prompts included
same: answers that are equal with and without speculation"""


def describe(plan: Plan, questions: Sequence[Question], outcome: Outcome) -> dict[str, Any]:
    """The setting as JSON: without it a figure says nothing."""
    spec, engine, pair = plan.steered, plan.config.engine, plan.pair
    info = outcome.models.get(STEERED)
    return {
        "model": plan.name,
        "target": spec.target,
        "pairs": [asdict(own) for own in spec.steering],
        "pair": pair.name,
        "mode": pair.mode,
        "tuned": plan.models.get(TUNED),
        "strengths": list(plan.strengths),
        "dataset": plan.data.name,
        "split": "all" if plan.limit is None else f"[:{plan.limit}]",
        "n_prompts": len(questions),
        "score": plan.score,
        "chat_template": None if info is None else info.tokenizer.has_chat_template,
        "temperature": 0.0,
        "max_tokens": plan.max_tokens,
        "stop": list(plan.stop),
        "draft": None if info is None else info.default_draft,
        "max_draft_tokens": spec.speculation.max_draft_tokens,
        "policy": spec.speculation.policy,
        "streams": plan.streams,
        "timed": min(plan.timed, len(questions)),
        "rounds": plan.rounds,
        "weights": spec.weights,
        "weights_loaded": {name: _formats(model.weights_keys) for name, model in outcome.models.items()},
        "prefix_caching": engine.prefix_caching,
        "device": engine.device,
        "threads": engine.threads,
        "cpu": cpu_name(),
        "provenance": provenance(),
    }


def _formats(keys: Sequence[str]) -> list[str]:
    """Format and kernels that run: what follows the hash in the weights' keys."""
    return [key.rpartition("/")[2] for key in keys]


def as_json(setting: Mapping[str, Any], rows: Sequence[Row], *, interrupted: bool) -> dict[str, Any]:
    """The whole report."""
    return {"setting": dict(setting), "interrupted": interrupted, "variants": [_entry(row) for row in rows]}


def _entry(row: Row) -> dict[str, Any]:
    tasks = {task: {**asdict(score), "share": score.share} for task, score in row.tasks.items()}
    return {**asdict(row), "tasks": tasks}


def answers_of(questions: Sequence[Question], outcome: Outcome) -> Iterator[dict[str, Any]]:
    """Every question with what each variant answered."""
    for index, question in enumerate(questions):
        said = {label: done.answers[index].text for label, done in outcome.scored.items()}
        yield {"where": question.where, "task": question.task, "answer": question.answer, "texts": said}


def print_report(console: Console, setting: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The report for people."""
    _lines(console, _headline(setting))
    for table in (_scores(rows), _speeds(rows)):
        console.print()
        console.print(table)
    _lines(console, _notes(setting, rows))
    console.print(_LEGEND, markup=False, highlight=False, soft_wrap=True)


def _lines(console: Console, lines: Iterator[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _headline(setting: Mapping[str, Any]) -> Iterator[str]:
    others = [pair["name"] for pair in setting["pairs"] if pair["name"] != setting["pair"]]
    kept = f"; as configured: {', '.join(others)}" if others else ""
    yield f"{setting['model']}: {setting['target']} steered by {setting['pair']} ({setting['mode']}){kept}"
    yield (
        f"{setting['dataset']}, {setting['n_prompts']} questions, {setting['score']} answers, greedy, at most "
        f"{setting['max_tokens']} tokens each"
    )
    yield (
        f"draft {setting['draft'] or 'none'}, {setting['max_draft_tokens']} tokens ({setting['policy']}); "
        f"{setting['rounds']} timed round(s) of {setting['timed']} questions"
    )
    yield f"weights {setting['weights']}, {setting['threads']} threads, {setting['cpu']}"


def _notes(setting: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What the tables do not say by themselves."""
    by_label = {row.label: row for row in rows}
    base, tuned = by_label.get(BASE_LABEL), by_label.get(TUNED)
    if setting["tuned"] is None:
        yield "\nno gap closed: without --tuned there is no ceiling"
    elif base is not None and tuned is not None:
        flat = [task for task in base.tasks if tuned.tasks[task].share <= base.tasks[task].share]
        if flat:
            yield f"\nno gap to close, as the tuned model is no better than the base: {', '.join(flat)}"


def _scores(rows: Sequence[Row]) -> Table:
    tasks = list(rows[0].tasks)
    named = tasks if len(tasks) > 1 else []
    table = plain_table("answers", *named, "mean", "gap closed", "changed", "tokens", "cut", many=True)
    for row in rows:
        shares = [_with_gap(row.tasks[task].share, row.tasks[task].gap_closed) for task in named]
        cells = (f"{row.mean:.1%}", share(row.gap_closed), share(row.argmax_changed))
        table.add_row(row.label, *shares, *cells, str(row.n_tokens), str(row.cut))
    return table


def _speeds(rows: Sequence[Row]) -> Table:
    streams = [speed.streams for speed in rows[0].speeds]
    columns = [name for count in streams for name in (f"{count} off", f"{count} on", "on/off")]
    table = plain_table("speed, tokens per second", "tau", "accepted", *columns, "same", many=True)
    for row in rows:
        own = row.acceptance
        acceptance = ("-", "-") if own is None else (number(own.tau, 2), share(own.draft_acceptance_rate))
        cells = [cell for speed in row.speeds for cell in _speed(speed)]
        table.add_row(row.label, *acceptance, *cells, _same(row.speeds))
    return table


def _speed(speed: Speed) -> tuple[str, str, str]:
    return number(speed.off, 1), number(speed.on, 1), number(speed.speedup, 2)


def _same(speeds: Sequence[Speed]) -> str:
    found = [speed.same_text for speed in speeds if speed.same_text is not None]
    return f"{sum(same for same, _ in found)} of {sum(count for _, count in found)}" if found else "-"


def _with_gap(share: float, gap: float | None) -> str:
    return f"{share:.1%}" if gap is None else f"{share:.1%} ({gap:.0%})"
