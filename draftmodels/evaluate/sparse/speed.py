"""Decode speed of parent and student through the serving engine, in alternating rounds.

Greedy, one request at a time, every answer as long as asked for, so that all variants decode the same number of tokens.
The first token, which the prompt's forward gives, and the time until it are left out.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate.progress import Progress
from paceline.draftmodels.evaluate.sparse.plan import PARENT, STUDENT
from paceline.server.engine.interface import AsyncEngine
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with or without the draft."""

    model: str
    drafts: bool

    def __str__(self) -> str:
        return f"{self.model} + draft" if self.drafts else self.model


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts once: the answers, tokens that were decoded after each one's first commit, and their seconds."""

    answers: tuple[tuple[int, ...], ...]
    decoded: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone."""
        return self.decoded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One variant over all rounds.

    Attributes:
        tokens_per_second: median over the rounds.
        over_parent: median over the rounds of the ratio to the parent without a draft in the same round.
        same_text: with a draft, answers that equal those without (first round); they must all.
    """

    variant: str
    tokens_per_second: float
    over_parent: float
    rounds: tuple[float, ...]
    same_text: tuple[int, int] | None


@dataclass(slots=True)
class Rounds:
    """What has been timed so far; only whole rounds count."""

    done: list[dict[Variant, Run]] = field(default_factory=list)


def variants(*, with_draft: bool) -> list[Variant]:
    """What is timed."""
    plain = [Variant(PARENT, False), Variant(STUDENT, False)]
    return plain + [Variant(one.model, True) for one in plain if with_draft]


async def time_rounds(
    engine: AsyncEngine,
    chosen: Sequence[Variant],
    prompts: Sequence[Prompt],
    *,
    rounds: int,
    max_tokens: int,
    into: Rounds,
    shown: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Warm every variant up with one prompt, then time the rounds; their order of variants alternates."""
    asker = _Asker(engine, max_tokens, clock)
    for variant in chosen if rounds else ():
        await asker.run(variant, prompts[:1], lambda tokens: None)
    for number in range(rounds):
        this: dict[Variant, Run] = {}
        for variant in chosen if number % 2 == 0 else reversed(chosen):
            shown.start(f"round {number + 1}/{rounds} {variant}")
            this[variant] = await asker.run(variant, prompts, shown.add)
        into.done.append(this)


def summarize(rounds: Sequence[dict[Variant, Run]]) -> list[Speed]:
    """Medians; empty without a round."""
    if not rounds:
        return []
    parent = Variant(PARENT, False)
    speeds = []
    for variant in variants(with_draft=len(rounds[0]) > 2):
        rates = tuple(done[variant].tokens_per_second for done in rounds)
        ratios = [rate / done[parent].tokens_per_second for rate, done in zip(rates, rounds, strict=True)]
        same = _same(rounds[0], variant) if variant.drafts else None
        speeds.append(Speed(str(variant), median(rates), median(ratios), rates, same))
    return speeds


def _same(done: dict[Variant, Run], variant: Variant) -> tuple[int, int]:
    pairs = list(zip(done[variant].answers, done[Variant(variant.model, False)].answers, strict=True))
    return sum(a == b for a, b in pairs), len(pairs)


class _Asker:
    def __init__(self, engine: AsyncEngine, max_tokens: int, clock: Callable[[], float]) -> None:
        self._engine, self._max_tokens, self._clock = engine, max_tokens, clock
        self._ids = itertools.count()

    async def run(self, variant: Variant, prompts: Sequence[Prompt], told: Callable[[int], None]) -> Run:
        answers, decoded, seconds = [], 0, 0.0
        for prompt in prompts:
            commits, took = await self._ask(variant, prompt)
            answers.append(tuple(itertools.chain.from_iterable(commits)))
            decoded += sum(map(len, commits[1:]))
            seconds += took
            told(len(answers[-1]))
        return Run(tuple(answers), decoded, seconds)

    async def _ask(self, variant: Variant, prompt: Prompt) -> tuple[list[Sequence[int]], float]:
        """What each forward committed, and the seconds from the first commit to the last."""
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=0.0, ignore_eos=True)
        speculation = SpeculationParams(enabled=variant.drafts)
        request = Request(f"evaluate-{next(self._ids)}", variant.model, prompt.tokens, sampling, speculation)
        commits: list[Sequence[int]] = []
        times: list[float] = []
        async for event in self._engine.submit(request):
            if event.token_ids:
                commits.append(event.token_ids)
                times.append(self._clock())
        return commits, times[-1] - times[0]
