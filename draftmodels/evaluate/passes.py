"""Passes over the prompts through the serving engine, with and without speculation, and with another draft.

Per temperature and draft one pass is examined and not timed; it also warms up. Then come timed rounds of a pass each,
with speculation and without, and with another draft between them. One stream takes these turns within each prompt,
several within each round; the order alternates. Owns the engine's life. Knows nothing of figures and tables.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.draftmodels.data.member_prompts import member_prompts
from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate.answers import Pass
from paceline.draftmodels.evaluate.asking import Asker, Unobserved
from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.draftmodels.evaluate.figures import Measured, Rival
from paceline.draftmodels.evaluate.plan import Plan
from paceline.draftmodels.evaluate.progress import Progress, progress
from paceline.server.engine.build import build_engine
from paceline.server.engine.interface import AsyncEngine, ModelInfo
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams, SteeringParams
from paceline.server.errors import ConfigError


@dataclass(slots=True)
class Outcome:
    """What has been measured so far; filled pass by pass, so that it survives an interruption.

    Attributes:
        model, against: with the draft, and with the one it is compared with.
        measured: temperatures whose examined passes are finished, with the timed rounds that are.
    """

    model: ModelInfo | None = None
    against: ModelInfo | None = None
    measured: list[Measured] = field(default_factory=list)


async def measure(plan: Plan, prompts: Sequence[Prompt], outcome: Outcome) -> None:
    """Load the models, run every pass, and leave the results in ``outcome``.

    Raises:
        UserError: a model cannot be loaded, or a prompt does not fit it.
        EngineError: the engine failed.
    """
    examiner = BlockExaminer()
    engine = build_engine(plan.config, Unobserved(), examiner)
    await engine.start()
    try:
        model, *others = engine.models.values()
        for option, served in zip(("--draft", "--against"), (model, *others), strict=False):
            if served.default_draft is None:
                raise ConfigError(f"{option} auto: no draft comes with Paceline for this target; name one")
        _check_lengths(prompts, plan, model)
        outcome.model, outcome.against = model, others[0] if others else None
        with progress(plan.passes * len(prompts)) as shown:
            passes = _Passes(engine, model, outcome.against, examiner, plan, prompts, shown)
            for temperature in plan.temperatures:
                await passes.measure(temperature, outcome)
    finally:
        await engine.stop()


def _check_lengths(prompts: Sequence[Prompt], plan: Plan, model: ModelInfo) -> None:
    longest = max(len(own) for p in prompts for own in (p.tokens, *member_prompts(p.tokens, model)))
    if longest + plan.max_tokens > model.context_length:
        raise ConfigError(
            f"--prompts: the longest has {longest} tokens, which with --max-tokens {plan.max_tokens} exceed the "
            f"context of {model.context_length}; lower --max-tokens or leave that prompt out"
        )


class _Passes:
    def __init__(
        self,
        engine: AsyncEngine,
        model: ModelInfo,
        against: ModelInfo | None,
        examiner: BlockExaminer,
        plan: Plan,
        prompts: Sequence[Prompt],
        shown: Progress,
    ) -> None:
        self._asker, self._examiner = Asker(engine, examiner, shown), examiner
        self._model, self._against = model, against
        self._plan, self._prompts = plan, prompts
        self._ids = itertools.count()

    async def measure(self, temperature: float, outcome: Outcome) -> None:
        """All passes at one temperature."""
        examined = await self._examine(self._model, temperature, "acceptance")
        rival = None
        if self._against is not None:
            rival = Rival(await self._examine(self._against, temperature, "acceptance of the other draft"))
        measured = Measured(temperature, examined, (), rival)
        outcome.measured.append(measured)
        for number in range(self._plan.rounds):
            label = f"T={temperature:g} round {number + 1}/{self._plan.rounds}"
            measured = await self._time(measured, label, backwards=number % 2 == 1)
            outcome.measured[-1] = measured

    async def _examine(self, model: ModelInfo, temperature: float, what: str) -> Pass:
        self._examiner.wants_overlaps = True
        requests = self._requests(temperature, model)
        examined = await self._asker.run(requests, self._plan.streams, f"T={temperature:g} {what}")
        self._examiner.wants_overlaps = False
        return examined

    async def _time(self, measured: Measured, label: str, *, backwards: bool) -> Measured:
        """One more round. The other draft is next to both, and in the middle of either order."""
        turns = [("with", self._model, True), ("without", self._model, False)]
        if self._against is not None:
            turns.insert(1, ("with the other", self._against, True))
        asked = {
            name: self._requests(measured.temperature, model, speculates) for name, model, speculates in turns
        }
        if self._plan.turns_within == "prompt":
            on, *other, off = await self._asker.run_by_turns(list(asked.values()), label, backwards=backwards)
        else:
            on, *other, off = await self._one_by_one(asked, label, backwards=backwards)
        return measured.with_round(on, off, other[0] if other else None)

    async def _one_by_one(
        self, asked: dict[str, list[tuple[Request, str]]], label: str, *, backwards: bool
    ) -> list[Pass]:
        """Whole passes, in the order of ``asked``, whatever order they ran in."""
        done: dict[str, Pass] = {}
        for name in reversed(asked) if backwards else asked:
            done[name] = await self._asker.run(asked[name], self._plan.streams, f"{label} {name}")
        return [done[name] for name in asked]

    def _requests(
        self, temperature: float, model: ModelInfo, speculates: bool = True
    ) -> list[tuple[Request, str]]:
        return [
            (self._request(index, prompt, model, temperature, speculates), prompt.category)
            for index, prompt in enumerate(self._prompts)
        ]

    def _request(
        self, index: int, prompt: Prompt, model: ModelInfo, temperature: float, speculates: bool
    ) -> Request:
        seed = self._plan.seed
        return Request(
            f"evaluate-{next(self._ids)}",
            model.name,
            prompt.tokens,
            SamplingParams(
                max_tokens=self._plan.max_tokens,
                temperature=temperature,
                seed=None if seed is None else seed + index,
            ),
            SpeculationParams(enabled=speculates),
            steering=SteeringParams(prompts=member_prompts(prompt.tokens, model)),
        )
