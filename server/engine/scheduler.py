"""Decides which sequences of which model run in the next step, and how many tokens each. No tensors, no HTTP.

Owns the queues of all served models and the block tables' growth. One step belongs to one model: the one that has
had the least engine time among those with work (fair stepping). Running sequences come first, oldest first; then
waiting ones are admitted in order while the token budget, the sequence limit and the KV blocks allow. When blocks
run out, drafts that are not in use lose theirs, then the youngest running sequence of any model is preempted and
recomputed later. A draft's table holds blocks only from the first step on that drafts with it.
"""

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from paceline.server.decoding.policy import Decision, Option, Reason
from paceline.server.engine.interface import Load
from paceline.server.engine.kv_blocks import BlockTable, KvBlocks
from paceline.server.engine.sequence import Sequence

#: A step's prefill gets at least this fraction (one over it) of the token budget, however many decodes and drafts run.
_LEAST_PREFILL_SHARE = 8


@dataclass(slots=True)
class Scheduled:
    """One sequence's share of a step.

    Attributes:
        num_tokens: known tokens to compute (a prefill chunk, or 1), of the member that lacks most.
        draft_tokens: how many tokens a proposer may draft behind them; blocks are reserved.
        option: how they are drafted, None if none are.
        left: known tokens that the member that lacks most will still lack after the step; settled when it is planned,
            as members run one after the other.
    """

    sequence: Sequence
    num_tokens: int
    draft_tokens: int = 0
    option: Option | None = None
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.sequence.remaining - self.num_tokens

    @property
    def completes(self) -> bool:
        """Whether all known tokens are computed after this step, so that a new one can be drawn."""
        return self.left == 0

    def chunk(self, table: BlockTable, tokens: SequenceOf[int]) -> SequenceOf[int]:
        """Known tokens that a member computes in this step.

        Members of a steered model may have prompts of different lengths. All finish theirs in the same step: what is
        left to do is at most the same for all of them.
        """
        return tokens[table.num_computed : max(0, len(tokens) - self.left)]


@dataclass(slots=True)
class StepPlan:
    """What one step runs; ``disabled`` as in ``StepStats``."""

    model: str
    items: list[Scheduled] = field(default_factory=list)
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    disabled: list[Reason] = field(default_factory=list)


class DraftPlanner(Protocol):
    """Who decides how much is drafted for which sequence of a model."""

    def plan_drafts(self, sequences: SequenceOf[Sequence]) -> list[Decision]:
        """One decision per sequence that decodes in the coming step."""
        ...


@dataclass(slots=True)
class _Queue:
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    engine_seconds: float = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)


class Scheduler:
    """See the module docstring.

    Args:
        models: the served models by name.
        blocks: the one KV pool.
        max_batch_tokens: token budget of a step; decodes and their drafts count first.
        max_running: sequences running at once, per model.
    """

    def __init__(
        self,
        models: Mapping[str, DraftPlanner],
        blocks: KvBlocks,
        *,
        max_batch_tokens: int,
        max_running: int,
    ) -> None:
        self._models = models
        self._queues = {name: _Queue() for name in models}
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return any(q.has_work for q in self._queues.values())

    def loads(self) -> Mapping[str, Load]:
        """Queue lengths per model."""
        return {name: Load(len(q.running), len(q.waiting)) for name, q in self._queues.items()}

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        queue = self._queues[sequence.request.model]
        if not queue.has_work:
            busy = [q.engine_seconds for q in self._queues.values() if q.has_work]
            queue.engine_seconds = max([queue.engine_seconds, *([min(busy)] if busy else [])])
        queue.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out and free its blocks."""
        queue = self._queues[sequence.request.model]
        if sequence in queue.running:
            queue.running.remove(sequence)
        else:
            queue.waiting.remove(sequence)
        self._release(sequence)

    def charge(self, model: str, seconds: float) -> None:
        """Account a step's duration to a model, for fair stepping."""
        self._queues[model].engine_seconds += seconds

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if nothing can run."""
        order = sorted(
            (name for name, q in self._queues.items() if q.has_work),
            key=lambda name: self._queues[name].engine_seconds,
        )
        for name in order:
            plan = self._plan(name)
            if plan.items:
                return plan
        return None

    def _plan(self, name: str) -> StepPlan:
        plan, queue = StepPlan(name), self._queues[name]
        prefilling = [s for s in queue.running if s.remaining > 1]
        decoding = [s for s in queue.running if s.remaining == 1]
        for sequence, decision in zip(decoding, self._models[name].plan_drafts(decoding), strict=True):
            if sequence in queue.running:  # not preempted by an older one in this loop
                self._decode(sequence, decision, plan)
        # Decodes always run: clients wait for them, and their cost hardly depends on the batch. Prefill gets the rest
        # of the budget, but never nothing.
        budget = self._max_batch_tokens - sum(item.num_tokens + item.draft_tokens for item in plan.items)
        budget = max(budget, self._max_batch_tokens // _LEAST_PREFILL_SHARE, 1)
        for sequence in prefilling:
            if budget > 0 and sequence in queue.running:
                plan.items.append(Scheduled(sequence, min(sequence.remaining, budget)))
                budget -= plan.items[-1].num_tokens
        if not plan.preemptions:  # whoever just lost its blocks must not take them back at once
            self._admit(queue, budget, plan)
        return plan

    def _decode(self, sequence: Sequence, decision: Decision, plan: StepPlan) -> None:
        if decision.length and not self._grow_for_draft(sequence, decision):
            decision = Decision(reason="no_room")
        while not decision.length and not self._grow(sequence):
            if not self._drop_draft(plan, also=sequence) and self._preempt_youngest(plan) is sequence:
                return
        plan.items.append(Scheduled(sequence, 1, decision.length, decision.option))
        if decision.reason is not None:
            plan.disabled.append(decision.reason)

    def _grow_for_draft(self, sequence: Sequence, decision: Decision) -> bool:
        """Room for the block in the tables of all members and, if a draft model makes it, in the draft's."""
        tables = [(table, len(tokens) + decision.length) for table, tokens in sequence.verifying]
        if decision.option is not None and decision.option.by_model and sequence.draft is not None:
            if not sequence.draft.blocks:
                self._blocks.reuse_prefix(sequence.draft, sequence.tokens)
            tables.append((sequence.draft, len(sequence.tokens) + decision.length))
        return self._blocks.grow(tables)

    def _grow(self, sequence: Sequence) -> bool:
        """Room for all known tokens in the tables of all members, or nothing."""
        return self._blocks.grow([(table, len(tokens)) for table, tokens in sequence.verifying])

    def _drop_draft(self, plan: StepPlan, *, also: Sequence | None = None) -> bool:
        """Free the blocks of one draft that has been idle, or that of ``also``: they are a luxury.

        False if there is none.
        """
        busy = {id(item.sequence) for item in plan.items if item.draft_tokens}
        for queue in self._queues.values():
            for sequence in queue.running:
                unused = id(sequence) not in busy and (sequence.draft_is_idle or sequence is also)
                if unused and sequence.draft is not None and sequence.draft.blocks:
                    self._blocks.release(sequence.draft)
                    return True
        return False

    def _admit(self, queue: _Queue, budget: int, plan: StepPlan) -> None:
        for sequence in list(queue.waiting):
            if budget <= 0 or len(queue.running) >= self._max_running:
                return
            if sequence.waits_for_leader:
                continue
            if not self._start(sequence, plan):
                return
            queue.waiting.remove(sequence)
            queue.running.append(sequence)
            sequence.timing.start()
            plan.items.append(Scheduled(sequence, min(sequence.remaining, budget)))
            budget -= plan.items[-1].num_tokens

    def _start(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Reuse cached blocks and take the rest; False (and nothing taken) if they are not to be had."""
        if sequence.sampling.prompt_logprobs is None:
            for table, tokens in sequence.verifying:
                self._blocks.reuse_prefix(table, tokens)
        while not self._grow(sequence):
            if not self._drop_draft(plan):
                self._release(sequence)
                return False
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.target.num_computed
        plan.prefix_queries += len(sequence.tokens)
        plan.prefix_hits += sequence.target.num_computed
        return True

    def _preempt_youngest(self, plan: StepPlan) -> Sequence:
        running = [s for q in self._queues.values() for s in q.running]
        victim = max(running, key=lambda s: s.arrival)
        queue = self._queues[victim.request.model]
        queue.running.remove(victim)
        queue.waiting.appendleft(victim)
        plan.items[:] = [item for item in plan.items if item.sequence is not victim]
        plan.preemptions += 1
        self._release(victim)
        return victim

    def _release(self, sequence: Sequence) -> None:
        for table, _ in sequence.cached:
            self._blocks.release(table)
