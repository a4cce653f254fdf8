"""What is compared, and the requests that ask each for an answer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.draftmodels.evaluate.steering.plan import EXPERT, STEERED, TUNED, Plan
from paceline.draftmodels.evaluate.steering.tasks import Question
from paceline.server.decoding.mixture import BASE, mixture
from paceline.server.engine.interface import ModelInfo
from paceline.server.engine.member_prompts import Prompts, Strengths, conversation_prompts, text_prompts
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams, SteeringParams
from paceline.server.errors import ConfigError

#: Label of the steered model with every pair off.
BASE_LABEL = "base"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the report.

    Attributes:
        model: name of the served model.
        strength: that the pair has, where this is one of the sweep.
        strengths: of all pairs that differ from the configuration.
        is_base: whether it is exactly the base, so that it is not measured again.
    """

    label: str
    model: str
    strength: float | None = None
    strengths: Strengths = field(default_factory=dict)
    is_base: bool = False


def variants(plan: Plan, info: ModelInfo) -> list[Variant]:
    """Base, expert, tuned base, and the sweep; ``info`` is the steered model's."""
    assert info.steering is not None
    pairs, members = info.steering.pairs, len(info.steering.views) + 1
    made = [Variant(BASE_LABEL, STEERED, strengths=dict.fromkeys(pair.name for pair in pairs))]
    made += [Variant(name, name) for name in (EXPERT, TUNED) if name in plan.models]
    for strength in plan.strengths:
        own = {plan.pair.name: strength}
        same = mixture(pairs, own, members) is None
        made.append(Variant(f"{plan.parameter} {strength:g}", STEERED, strength, own, same))
    return made


class Requests:
    """Greedy requests; every one has an id of its own."""

    def __init__(self, plan: Plan, models: Mapping[str, ModelInfo]) -> None:
        self._plan, self._models = plan, models
        self._ids = itertools.count()

    def answer(self, variant: Variant, question: Question, *, speculates: bool) -> Request:
        """Ask a variant a question."""
        prompt, members = question.tokens, self._members(variant.strengths, question)
        if variant.model == EXPERT:
            prompt, members = self._expert_prompt(question), ()
        elif variant.model != STEERED:
            members = ()
        sampling = SamplingParams(
            max_tokens=self._plan.max_tokens, temperature=0.0, stop=self._plan.stop, logprobs=None
        )
        steering = SteeringParams(variant.strengths, members)
        speculation = SpeculationParams(enabled=speculates)
        plain = question.messages is None
        return Request(self._id(), variant.model, prompt, sampling, speculation, 1, plain, steering)

    def score_by_base(self, tokens: Sequence[int]) -> Request:
        """Ask the base what it finds most probable at each position of a text."""
        off = SteeringParams(dict.fromkeys(pair.name for pair in self._plan.steered.steering))
        sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1)
        return Request(
            self._id(), STEERED, tuple(tokens), sampling, SpeculationParams(enabled=False), steering=off
        )

    def check_lengths(self, chosen: Sequence[Variant], questions: Sequence[Question]) -> None:
        """Raise ConfigError for a question that leaves no room for an answer."""
        for variant, question in itertools.product(chosen, questions):
            request, info = self.answer(variant, question, speculates=False), self._models[variant.model]
            longest = max(map(len, (request.prompt_ids, *request.steering.prompts)))
            if longest + self._plan.max_tokens > info.context_length:
                raise ConfigError(
                    f"{question.where}: the prompt has {longest} tokens, which with --max-tokens "
                    f"{self._plan.max_tokens} exceed the context of {info.context_length}; lower --max-tokens or "
                    "leave that question out"
                )

    def _members(self, strengths: Strengths, question: Question) -> Prompts:
        info = self._models[STEERED]
        if question.messages is not None:
            return conversation_prompts(question.messages, question.tokens, info, strengths)
        return text_prompts(question.text, question.tokens, info, strengths)

    def _expert_prompt(self, question: Question) -> tuple[int, ...]:
        """What the expert reads as a member: its own template and prefix count."""
        steering = self._models[STEERED].steering
        assert steering is not None
        pair = next(pair for pair in steering.pairs if pair.name == self._plan.pair.name)
        alone: dict[str, float | None] = dict.fromkeys(pair.name for pair in steering.pairs)
        prompts = self._members(alone | {pair.name: 1.0}, question)
        return prompts[pair.expert - 1] if prompts and pair.expert not in (None, BASE) else question.tokens

    def _id(self) -> str:
        return f"evaluate-{next(self._ids)}"
