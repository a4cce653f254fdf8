"""Passes over the prompts through the serving engine, with and without speculation.

Per temperature one pass is examined and not timed; it also warms up. Then come timed rounds of two passes each, with
speculation and without, whose order alternates. Owns the engine's life. Knows nothing of figures and tables.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.draftmodels.data.member_prompts import member_prompts
from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate.answers import Pass
from paceline.draftmodels.evaluate.asking import Asker, Unobserved
from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.draftmodels.evaluate.figures import Measured
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
        measured: temperatures whose examined pass is finished, with the timed rounds that are.
    """

    model: ModelInfo | None = None
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
        (outcome.model,) = engine.models.values()
        if outcome.model.default_draft is None:
            raise ConfigError("--draft auto: no draft comes with Paceline for this target; name one")
        _check_lengths(prompts, plan, outcome.model)
        with progress(plan.passes * len(prompts)) as shown:
            passes = _Passes(engine, outcome.model, examiner, plan, prompts, shown)
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
        examiner: BlockExaminer,
        plan: Plan,
        prompts: Sequence[Prompt],
        shown: Progress,
    ) -> None:
        self._asker, self._model, self._examiner = Asker(engine, examiner, shown), model, examiner
        self._plan, self._prompts = plan, prompts
        self._ids = itertools.count()

    async def measure(self, temperature: float, outcome: Outcome) -> None:
        """All passes at one temperature."""
        self._examiner.wants_overlaps = True
        examined = await self._run(temperature, f"T={temperature:g} acceptance", speculates=True)
        self._examiner.wants_overlaps = False
        outcome.measured.append(Measured(temperature, examined, ()))
        rounds: list[tuple[Pass, Pass]] = []
        for number in range(self._plan.rounds):
            label = f"T={temperature:g} round {number + 1}/{self._plan.rounds}"
            done: dict[bool, Pass] = {}
            for speculates in (True, False) if number % 2 == 0 else (False, True):
                name = f"{label} {'with' if speculates else 'without'}"
                done[speculates] = await self._run(temperature, name, speculates=speculates)
            rounds.append((done[True], done[False]))
            outcome.measured[-1] = Measured(temperature, examined, tuple(rounds))

    async def _run(self, temperature: float, label: str, *, speculates: bool) -> Pass:
        requests = [
            (self._request(index, prompt, temperature, speculates), prompt.category)
            for index, prompt in enumerate(self._prompts)
        ]
        return await self._asker.run(requests, self._plan.streams, label)

    def _request(self, index: int, prompt: Prompt, temperature: float, speculates: bool) -> Request:
        seed = self._plan.seed
        return Request(
            f"evaluate-{next(self._ids)}",
            self._model.name,
            prompt.tokens,
            SamplingParams(
                max_tokens=self._plan.max_tokens,
                temperature=temperature,
                seed=None if seed is None else seed + index,
            ),
            SpeculationParams(enabled=speculates),
            steering=SteeringParams(prompts=member_prompts(prompt.tokens, self._model)),
        )
