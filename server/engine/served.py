"""A served model as the engine steps it: the target's runner, its proposers and its speculation settings."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from paceline.server.decoding.lenience import LenienceForm
from paceline.server.decoding.policy import MAX_DRAFT_TOKENS, Candidate, Decision, Policy, StepWork
from paceline.server.decoding.verify import DraftBlock, Rule
from paceline.server.engine.in_flight import Outcome
from paceline.server.engine.interface import ModelInfo, check_lenience, check_strengths
from paceline.server.engine.proposers import EMPTY_BLOCK, NGRAM, DraftWork, Proposer
from paceline.server.engine.request import Request, SpeculationParams
from paceline.server.engine.runner import Runner
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import Sequence
from paceline.server.engine.steering import Steering
from paceline.server.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True)
class ServedModel:
    """One entry of ``/v1/models``.

    Attributes:
        policy: chooses draft lengths and sources; learns from every step.
        rule: verification rule for unseeded sampled requests; greedy and seeded ones need none.
        lenience_form: what requests' lenience means; how far it may go is ``info.min_lenience``.
        steering: of a steered model.
    """

    info: ModelInfo
    runner: Runner
    proposers: Mapping[str, Proposer]
    policy: Policy
    rule: Rule
    lenience_form: LenienceForm = "exp"
    steering: Steering | None = None

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError for what this model can never run."""
        wanted = len(request.prompt_ids) + request.sampling.max_tokens
        if not request.prompt_ids:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if wanted > self.info.context_length:
            raise ContextLengthError(
                f"this model's context is {self.info.context_length} tokens, but the prompt has "
                f"{len(request.prompt_ids)} and {request.sampling.max_tokens} more were asked for",
                code="context_length_exceeded",
            )
        draft, length = request.speculation.draft, request.speculation.max_draft_tokens
        if draft is not None and draft not in self.proposers:
            raise InvalidRequestError(
                f"unknown draft {draft!r}; this model offers {sorted(self.proposers) or 'none'}",
                param="speculation.draft",
            )
        if length is not None and not 0 <= length <= MAX_DRAFT_TOKENS:
            raise InvalidRequestError(
                f"max_draft_tokens must be between 0 and {MAX_DRAFT_TOKENS}",
                param="speculation.max_draft_tokens",
            )
        check_lenience(request.speculation.lenience, self.info, seeded=request.sampling.seed is not None)
        if self.steering is not None:
            self.steering.check(request)
        else:
            check_strengths(request.steering.strengths, ())

    def blocks_needed(self, request: Request) -> int:
        """KV blocks that a choice of a request may take at most, but for the draft's: it gives way."""
        longest = len(request.prompt_ids) + request.sampling.max_tokens
        steering = 0 if self.steering is None else self.steering.blocks_needed(request)
        return self.runner.layout.blocks_for(longest) + steering

    def sequences(self, request: Request) -> list[Sequence]:
        """One sequence per choice, in choice order."""
        sources, length = self._sources(request.speculation), self._max_draft_tokens(request.speculation)
        layouts = [layout for name in sources if (layout := self.proposers[name].layout) is not None]
        made: list[Sequence] = []
        for choice in range(request.n):
            made.append(
                Sequence(
                    request,
                    choice,
                    tokenizer=self.info.tokenizer,
                    target=self.runner.layout,
                    draft=layouts[0] if layouts else None,
                    sources=sources,
                    max_draft_tokens=length,
                    context_length=self.info.context_length,
                    leader=made[0] if made else None,
                    mixture=None if self.steering is None else self.steering.mixture(request),
                    tracks=() if self.steering is None else self.steering.tracks(request),
                )
            )
        return made

    def _max_draft_tokens(self, wish: SpeculationParams) -> int:
        if not wish.enabled:
            return 0
        return self.info.max_draft_tokens if wish.max_draft_tokens is None else wish.max_draft_tokens

    def _sources(self, wish: SpeculationParams) -> tuple[str, ...]:
        """Proposers that may draft for a request: the one it names, else the model's and, if the policy can choose,
        n-grams beside it."""
        name = wish.draft or self.info.default_draft
        if name is None or not self._max_draft_tokens(wish):
            return ()
        beside = (
            wish.draft is None and self.policy.chooses_source and name != NGRAM and NGRAM in self.proposers
        )
        return (name, NGRAM) if beside else (name,)

    def plan_drafts(self, sequences: SequenceOf[Sequence]) -> list[Decision]:
        """See ``scheduler.DraftPlanner``."""
        decisions = self.policy.resting([s.draft_history for s in sequences])
        if decisions is None:
            decisions = self.policy.decide([self._candidate(s) for s in sequences])
        off = Decision(reason="request" if self.info.default_draft is not None else None)
        return [d if s.sources else off for d, s in zip(decisions, sequences, strict=True)]

    def _candidate(self, sequence: Sequence) -> Candidate:
        options = [self.proposers[name].option(name, sequence) for name in sequence.sources]
        return Candidate(
            sequence.draft_history,
            [option for option in options if option is not None],
            sequence.draft_limit,
            len(sequence.tokens),
            sequence.expected_tokens,
        )

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """A draft block per item, each from the proposer that its option names."""
        blocks = [EMPTY_BLOCK] * len(items)
        for name, proposer in self.proposers.items():
            mine = [
                i for i, item in enumerate(items) if item.option is not None and item.option.source == name
            ]
            if mine:
                for i, block in zip(mine, proposer.propose([items[i] for i in mine], generator), strict=True):
                    blocks[i] = block
        return blocks

    def learn(self, outcomes: SequenceOf[Outcome], seconds: Mapping[str, float]) -> None:
        """Tell the policy how a step went; ``seconds`` by phase."""
        for outcome in outcomes:
            option = outcome.item.option
            if option is not None and outcome.drafted:
                history = outcome.item.sequence.draft_history
                self.policy.on_block(history, option, outcome.drafted, outcome.accepted)
        self.policy.on_step(self._work(outcomes, seconds))

    def _work(self, outcomes: SequenceOf[Outcome], seconds: Mapping[str, float]) -> StepWork:
        rows = [(o.known + o.drafted, len(o.item.sequence.tokens)) for o in outcomes]
        work = [w for proposer in self.proposers.values() if (w := proposer.take_work()) is not None]
        drafting = work[0] if work else DraftWork()
        context = sum(context for _, context in rows) // max(1, len(rows))
        return StepWork(
            rows=sum(count for count, _ in rows),
            row_context=sum(count * context for count, context in rows),
            decodes_only=all(o.item.num_tokens == 1 for o in outcomes),
            target_seconds=sum(seconds.values()) - seconds["draft"],
            draft_forwards=drafting.forwards,
            draft_rows=drafting.rows,
            draft_row_context=drafting.rows * context,
            catch_up_rows=drafting.catch_up_rows,
            draft_seconds=seconds["draft"],
        )

    def forget(self, sequence: Sequence) -> None:
        """Drop what the proposers keep for a finished sequence."""
        for name in sequence.sources:
            self.proposers[name].forget(sequence)
