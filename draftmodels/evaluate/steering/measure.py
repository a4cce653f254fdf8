"""The measurement as a whole: load what is compared into one engine, score every answer, then time some of them."""

import asyncio
from collections.abc import Sequence
from itertools import product

from paceline.draftmodels.evaluate.answers import Answer, Pass
from paceline.draftmodels.evaluate.asking import Asker, Unobserved
from paceline.draftmodels.evaluate.examiner import BlockExaminer
from paceline.draftmodels.evaluate.progress import Progress, progress
from paceline.draftmodels.evaluate.steering.outcome import Changed, Kind, Outcome
from paceline.draftmodels.evaluate.steering.plan import STEERED, TUNED, Plan
from paceline.draftmodels.evaluate.steering.tasks import Question
from paceline.draftmodels.evaluate.steering.variants import Requests, Variant, variants
from paceline.server.engine.build import build_engine
from paceline.server.engine.interface import AsyncEngine, ModelInfo
from paceline.server.models.manifest import check_tokenizer


async def measure(plan: Plan, questions: Sequence[Question], outcome: Outcome) -> None:
    """Fill ``outcome``.

    Raises:
        UserError: a model that cannot be loaded, or questions that do not fit it.
        EngineError: the engine failed.
    """
    examiner = BlockExaminer()
    engine = build_engine(plan.config, Unobserved(), examiner)
    await engine.start()
    try:
        outcome.models = engine.models
        target = engine.models[STEERED]
        if TUNED in engine.models:
            check_tokenizer(target.tokenizer.sha256, engine.models[TUNED].tokenizer.sha256, who="tuned model")
        outcome.variants = variants(plan, target)
        requests = Requests(plan, engine.models)
        requests.check_lengths(outcome.variants, questions)
        own = [variant for variant in outcome.variants if not variant.is_base]
        timed, turns = questions[: plan.timed], turns_of(plan, own, target)
        swept = sum(variant.strength is not None for variant in own)
        with progress(len(questions) * (len(own) + swept) + plan.rounds * len(turns) * len(timed)) as shown:
            passes = _Passes(engine, examiner, plan, requests, shown)
            for variant in own:
                await passes.score(variant, questions, outcome)
            for number in range(plan.rounds):
                outcome.rounds.append(await passes.round(number, turns, timed))
    finally:
        await engine.stop()


def turns_of(plan: Plan, chosen: Sequence[Variant], target: ModelInfo) -> list[tuple[Kind, Variant]]:
    """The passes of a round: one stream and many, with speculation where there is a draft, and without."""
    kinds = product(dict.fromkeys((1, plan.streams)), (True, False))
    return [
        (Kind(streams, speculates), variant)
        for (streams, speculates), variant in product(kinds, chosen)
        if not speculates or (variant.model == STEERED and target.default_draft is not None)
    ]


class _Passes:
    def __init__(
        self,
        engine: AsyncEngine,
        examiner: BlockExaminer,
        plan: Plan,
        requests: Requests,
        shown: Progress,
    ) -> None:
        self._engine, self._examiner, self._plan = engine, examiner, plan
        self._requests, self._shown = requests, shown
        self._asker = Asker(engine, examiner, shown)

    async def score(self, variant: Variant, questions: Sequence[Question], outcome: Outcome) -> None:
        """Answer everything once, with speculation, and see where a steered answer is not the base's."""
        self._examiner.wants_overlaps = True
        kind = Kind(self._plan.streams, speculates=True)
        done = await self._run(variant, questions, kind, f"{variant.label}: answers")
        self._examiner.wants_overlaps = False
        if variant.strength is not None:
            outcome.changed[variant.label] = await self._changed(variant, questions, done.answers)
        outcome.scored[variant.label] = done

    async def round(
        self, number: int, turns: Sequence[tuple[Kind, Variant]], questions: Sequence[Question]
    ) -> dict[tuple[str, Kind], Pass]:
        """All turns once; every other round goes backwards."""
        done: dict[tuple[str, Kind], Pass] = {}
        for kind, variant in turns if number % 2 == 0 else reversed(turns):
            how = f"{kind.streams} stream(s){', speculating' if kind.speculates else ''}"
            label = f"{variant.label}: round {number + 1}/{self._plan.rounds}, {how}"
            done[variant.label, kind] = await self._run(variant, questions, kind, label)
        return done

    async def _run(self, variant: Variant, questions: Sequence[Question], kind: Kind, label: str) -> Pass:
        made = [(self._requests.answer(variant, q, speculates=kind.speculates), q.task) for q in questions]
        return await self._asker.run(made, kind.streams, label)

    async def _changed(
        self, variant: Variant, questions: Sequence[Question], answers: Sequence[Answer]
    ) -> Changed:
        """Run the base over the answers, whatever it would have said itself before."""
        self._shown.start(f"{variant.label}: the base on them")
        waiting = iter(zip(questions, answers, strict=True))
        counts: list[int] = []

        async def work() -> None:
            for question, answer in waiting:
                counts.append(await self._differing(question, answer))
                self._shown.add(len(answer.tokens))

        await asyncio.gather(*(work() for _ in range(self._plan.streams)))
        return Changed(sum(counts), sum(len(answer.tokens) for answer in answers))

    async def _differing(self, question: Question, answer: Answer) -> int:
        request = self._requests.score_by_base([*question.tokens, *answer.tokens])
        events = [event async for event in self._engine.submit(request)]
        found = [one for event in events for one in event.prompt_logprobs or ()][len(question.tokens) :]
        return sum(one.top[0][0] != one.token_id for one in found)
