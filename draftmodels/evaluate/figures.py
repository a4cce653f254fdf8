"""From answers to figures: acceptance of the drafted tokens, tokens per forward, and speed against no speculation.

Words as in the HTTP contract: alpha = mean of sum_v min(p, q) over the positions that verification examined (at T = 0
the share of matches there), draft_acceptance_rate = accepted / drafted, tau = committed tokens / target forwards. Pure
Python. A figure without anything to count is None.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median, stdev

from paceline.draftmodels.evaluate.answers import Answer, Block, Pass


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How well drafted tokens were accepted.

    Attributes:
        n_tokens: committed tokens, all of them.
        target_forwards: those that decode; the prompt's, with the first token, is left out of them and of ``tau``.
        num_spec_steps: forwards among them that verified a block.
        alpha: see the module; None if q is not known (seeded sampling).
        alpha_per_position: accepted / examined at draft position i. It counts what happened, so that it exists for
            seeded sampling too; under block verification it can exceed the overlap.
        overlap_per_position: mean of sum_v min(p, q) there.
        tau_formula: mean over the forwards of (1 - alpha^(k+1)) / (1 - alpha), k draft tokens each (2211.17192, eq. 1):
            what acceptance that is independent of the position would give.
        acceptance_histogram: verified blocks by how many draft tokens were accepted, length K + 1.
        drafted_by_source: draft tokens by proposer.
    """

    n_prompts: int
    n_tokens: int
    target_forwards: int
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    alpha: float | None
    alpha_per_position: tuple[float | None, ...]
    overlap_per_position: tuple[float | None, ...]
    examined_per_position: tuple[int, ...]
    draft_acceptance_rate: float | None
    tau: float | None
    tau_formula: float | None
    acceptance_histogram: tuple[int, ...]
    drafted_by_source: dict[str, int]


@dataclass(frozen=True, slots=True)
class Speed:
    """Wall-clock speed with and without speculation.

    Attributes:
        tokens_per_second: median over the rounds; prefill included. Of a category: of its requests' own time, which
            overlaps when several streams run.
        speedup: median over the rounds of the ratio within a round.
        rounds: (with, without) of each round, tokens per second.
        tau: committed tokens / target forwards of the timed passes with speculation.
    """

    tokens_per_second: float
    tokens_per_second_without: float
    speedup: float
    rounds: tuple[tuple[float, float], ...]
    tau: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Figures of one category, or of everything."""

    acceptance: Acceptance
    speed: Speed | None


@dataclass(frozen=True, slots=True)
class Against:
    """Another draft, and how much faster than it the draft serves.

    Attributes:
        group: the other draft's own figures.
        ratios: of each round, the draft's tokens per second over the other draft's.
        ratio: their mean; None without a timed round.
        standard_error: of that mean; None with fewer than two.
    """

    group: Group
    ratios: tuple[float, ...]
    ratio: float | None
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """Everything about one temperature.

    Attributes:
        same_text: (prompts whose text was the same with and without speculation, whoever drafted, prompts compared),
            where they must agree: greedy or seeded. None elsewhere, or without a timed round.
    """

    temperature: float
    total: Group
    categories: dict[str, Group]
    same_text: tuple[int, int] | None
    against: Against | None = None


@dataclass(frozen=True, slots=True)
class Rival:
    """The finished passes of the draft that is compared with: the examined one, and one timed pass per round."""

    examined: Pass
    timed: tuple[Pass, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """The finished passes of one temperature: the examined one and the timed (with, without) rounds."""

    temperature: float
    examined: Pass
    rounds: tuple[tuple[Pass, Pass], ...]
    rival: Rival | None = None

    def with_round(self, on: Pass, off: Pass, rival: Pass | None) -> "Measured":
        """One more round; ``rival`` is the other draft's pass, where there is another."""
        others = self.rival
        if others is not None and rival is not None:
            others = replace(others, timed=(*others.timed, rival))
        return replace(self, rounds=(*self.rounds, (on, off)), rival=others)


def summarize(measured: Measured, max_draft_tokens: int, *, seeded: bool) -> Result:
    """Figures in total and per category."""
    answers, rounds = measured.examined.answers, measured.rounds
    names = list(dict.fromkeys(answer.category for answer in answers))
    exact = bool(rounds) and (measured.temperature == 0 or seeded)
    rival = measured.rival
    return Result(
        measured.temperature,
        Group(acceptance(answers, max_draft_tokens), _speed(rounds, None)),
        {
            name: Group(
                acceptance([a for a in answers if a.category == name], max_draft_tokens), _speed(rounds, name)
            )
            for name in names
        },
        _same_text(*rounds[0], *(rival.timed[:1] if rival else ())) if exact else None,
        None if rival is None else _against(rival, rounds, max_draft_tokens),
    )


def _against(rival: Rival, rounds: Sequence[tuple[Pass, Pass]], max_draft_tokens: int) -> Against:
    own = [(other, off) for other, (_, off) in zip(rival.timed, rounds, strict=True)]
    ratios = [
        _rate(on, None) / _rate(other, None) for other, (on, _) in zip(rival.timed, rounds, strict=True)
    ]
    return Against(
        Group(acceptance(rival.examined.answers, max_draft_tokens), _speed(own, None)),
        tuple(ratios),
        mean(ratios) if ratios else None,
        stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
    )


def acceptance(answers: Sequence[Answer], max_draft_tokens: int) -> Acceptance:
    """Figures of answers with speculation whose blocks were examined."""
    blocks = [block for answer in answers for block in answer.blocks]
    drafted, accepted = sum(b.drafted for b in blocks), sum(b.accepted for b in blocks)
    examined = [sum(b.examined > i for b in blocks) for i in range(max_draft_tokens)]
    kept = [sum(b.accepted > i for b in blocks) for i in range(max_draft_tokens)]
    at = [[b.overlaps[i] for b in blocks if b.overlaps and b.examined > i] for i in range(max_draft_tokens)]
    forwards = sum(answer.forwards for answer in answers)
    alpha = _mean([value for values in at for value in values])
    return Acceptance(
        n_prompts=len(answers),
        n_tokens=sum(len(answer.tokens) for answer in answers),
        target_forwards=forwards,
        num_spec_steps=len(blocks),
        num_draft_tokens=drafted,
        num_accepted_draft_tokens=accepted,
        alpha=alpha,
        alpha_per_position=tuple(_ratio(k, n) for k, n in zip(kept, examined, strict=True)),
        overlap_per_position=tuple(map(_mean, at)),
        examined_per_position=tuple(examined),
        draft_acceptance_rate=_ratio(accepted, drafted),
        tau=tau(answers),
        tau_formula=None if alpha is None else _expected_tau(alpha, blocks, forwards),
        acceptance_histogram=_histogram(blocks, max_draft_tokens),
        drafted_by_source=_by_source(blocks),
    )


def tau(answers: Iterable[Answer]) -> float | None:
    """Committed tokens / target forwards, the prompts' own left out."""
    answers = list(answers)
    return _ratio(sum(a.decoded for a in answers), sum(a.forwards for a in answers))


def expected_tokens(alpha: float, draft_tokens: int) -> float:
    """(1 - alpha^(k+1)) / (1 - alpha): tokens per forward if each of k tokens is accepted with alpha."""
    if alpha == 1:
        return draft_tokens + 1.0
    return float((1 - alpha ** (draft_tokens + 1)) / (1 - alpha))


def _expected_tau(alpha: float, blocks: Sequence[Block], forwards: int) -> float | None:
    """Every forward with its own draft length, which ends of answers and adaptive policies vary."""
    plain = forwards - len(blocks)
    expected = sum(expected_tokens(alpha, block.drafted) for block in blocks)
    return (expected + plain) / forwards if forwards else None


def _histogram(blocks: Sequence[Block], max_draft_tokens: int) -> tuple[int, ...]:
    counts = [0] * (max_draft_tokens + 1)
    for block in blocks:
        counts[block.accepted] += 1
    return tuple(counts)


def _by_source(blocks: Sequence[Block]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block.source] = counts.get(block.source, 0) + block.drafted
    return counts


def _speed(rounds: Sequence[tuple[Pass, Pass]], category: str | None) -> Speed | None:
    rates = [(_rate(on, category), _rate(off, category)) for on, off in rounds]
    if not rates:
        return None
    answers = [a for on, _ in rounds for a in on.answers if category in (None, a.category)]
    return Speed(
        tokens_per_second=median(on for on, _ in rates),
        tokens_per_second_without=median(off for _, off in rates),
        speedup=median(on / off for on, off in rates),
        rounds=tuple(rates),
        tau=tau(answers),
    )


def _rate(one: Pass, category: str | None) -> float:
    """Tokens per second of a pass; every request has at least one token and takes time."""
    if category is None:
        return sum(len(a.tokens) for a in one.answers) / one.seconds
    mine = [a for a in one.answers if a.category == category]
    return sum(len(a.tokens) for a in mine) / sum(a.seconds for a in mine)


def _same_text(*passes: Pass) -> tuple[int, int]:
    texts = [{answer.tokens for answer in own} for own in zip(*(one.answers for one in passes), strict=True)]
    return sum(len(own) == 1 for own in texts), len(texts)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
