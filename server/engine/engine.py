"""The step loop: one ragged forward per step for prefill, decode and verify, for any number of served models.

``Engine`` is synchronous and single-threaded; ``native.NativeEngine`` gives it a thread and an asyncio face. All
mutable state lives behind ``submit``, ``cancel`` and ``step``.
"""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial

import torch
from torch import Tensor

from paceline.server.decoding.lenience import Lenience
from paceline.server.decoding.rows import Row, is_unseeded
from paceline.server.decoding.sampler import needs_temperature_at_most, process
from paceline.server.decoding.verify import match_prefix, verify
from paceline.server.engine.examine import Examiner
from paceline.server.engine.in_flight import (
    InFlight,
    assemble,
    prompt_logprobs,
    score,
    score_prompt,
    show_blocks,
)
from paceline.server.engine.interface import EngineObserver, FinishedReason, Load, RequestStats, StepStats
from paceline.server.engine.kv_blocks import KvBlocks
from paceline.server.engine.proposers import make_row
from paceline.server.engine.request import Request, TokenEvent
from paceline.server.engine.runner import SampledVerifier, TokenChooser
from paceline.server.engine.scheduler import Scheduler, StepPlan
from paceline.server.engine.sequence import Sequence
from paceline.server.engine.served import ServedModel
from paceline.server.errors import InvalidRequestError, UnknownModelError


class Engine:
    """Steps every served model over one KV pool.

    Args:
        models: by served name.
        blocks: the KV pool that all their layouts use.
        scheduler: owner of the queues, over the same pool.
        observer: told about every step and finished choice.
        seed: of the generator for unseeded sampling.
        examiner: shown every verified block, outside the times that the policy and the observer are told.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        blocks: KvBlocks,
        scheduler: Scheduler,
        observer: EngineObserver,
        *,
        seed: int,
        examiner: Examiner | None = None,
    ) -> None:
        self._models, self._blocks = models, blocks
        self._examiner = examiner
        self._scheduler, self._observer = scheduler, observer
        device = next(iter(models.values())).runner.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._open: dict[str, list[Sequence]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def loads(self) -> Mapping[str, Load]:
        """Running and waiting choices per model."""
        return self._scheduler.loads()

    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0..1."""
        return 1 - self._blocks.num_free / self._blocks.num_blocks

    def check(self, request: Request) -> None:
        """Raise UnknownModelError or InvalidRequestError for what can never run; touches no mutable state."""
        model = self._models.get(request.model)
        if model is None:
            raise UnknownModelError(f"unknown model {request.model!r}", param="model", code="model_not_found")
        model.check(request)
        needed = model.blocks_needed(request)
        if needed > self._blocks.num_blocks:
            raise InvalidRequestError(
                f"prompt and max_tokens ({len(request.prompt_ids) + request.sampling.max_tokens} tokens) need {needed} "
                f"KV blocks, but the server has "
                f"{self._blocks.num_blocks}; lower max_tokens or raise kv_cache_gib",
                param="max_tokens",
            )

    def submit(self, request: Request) -> None:
        """Queue a checked request."""
        self._open[request.id] = self._models[request.model].sequences(request)
        for sequence in self._open[request.id]:
            self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are ignored (it may just have finished)."""
        for sequence in self._open.pop(request_id, []):
            if sequence.finish_reason is None:
                self._retire(sequence, "abort")

    def step(self) -> list[tuple[str, TokenEvent]]:
        """Run one step; returns (request id, event) pairs in commit order."""
        clock = _Clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        model = self._models[plan.model]
        clock.mark("schedule")
        drafts = model.propose(plan.items, self._generator)
        clock.mark("draft")
        batch, rows = assemble(plan.items, drafts)
        if model.steering is None:
            logits = model.runner.forward(batch)
        else:
            logits = model.steering.forward(model.runner, batch, rows)
        clock.mark("forward")
        scores = self._verify(model, logits, rows)
        clock.mark("sample")
        events = [event for row in rows if (event := self._commit(row, logits)) is not None]
        clock.mark("commit")
        model.learn([row.outcome for row in rows], clock.phases)
        self._scheduler.charge(plan.model, clock.total)
        self._observer.on_step(_step_stats(plan, rows, events, clock.phases))
        if self._examiner is not None:
            show_blocks(self._examiner, rows, scores)
        return events

    def _verify(self, model: ServedModel, logits: Tensor, rows: SequenceOf[InFlight]) -> Tensor | None:
        """Draw the next token of every sequence whose known tokens are complete.

        Returns:
            The processed scores it drew from, sequence after sequence; None if it needed none.
        """
        drawing = [row for row in rows if row.item.completes and row.item.sequence.max_tokens > 0]
        if not drawing:
            return None
        index = [i for row in drawing for i in range(row.first_drawn, row.logits.stop)]
        chosen = logits if len(index) == len(logits) else logits[index]
        if all(row.is_exact_argmax for row in drawing):
            _match(drawing, model.runner.argmax(chosen))
            return None
        states = [
            make_row(row.item.sequence, row.block.token_ids[:i])
            for row in drawing
            for i in range(len(row.block.token_ids) + 1)
        ]
        chooser = model.runner if isinstance(model.runner, TokenChooser) else None
        if chooser is not None and self._examiner is None and _needs_no_process(drawing, states):
            _match(drawing, chooser.choose_tokens(chosen, states, warped=False))
            return None
        scores = process(chosen, states)
        verdicts = verify(
            scores,
            states,
            [row.block for row in drawing],
            model.rule,
            self._generator,
            _lenience(model, drawing),
            model.runner.verify_sampled if isinstance(model.runner, SampledVerifier) else None,
            None if chooser is None else partial(chooser.choose_tokens, warped=True),
        )
        for row, verdict in zip(drawing, verdicts, strict=True):
            row.verdict = verdict
        return scores

    def _commit(self, row: InFlight, logits: Tensor) -> tuple[str, TokenEvent] | None:
        """Take over what a step computed; None if there is nothing to tell yet."""
        sequence, completes = row.item.sequence, row.item.completes
        first = sequence.output_tokens == 0
        if sequence.sampling.prompt_logprobs is not None and first:
            score_prompt(row, logits)
        sequence.target.num_computed += row.known_tokens + len(row.block.token_ids)
        kept: tuple[int, ...] = ()
        text, logprobs = "", None
        if row.verdict is not None:
            committed = sequence.commit([*row.block.token_ids[: row.verdict.accepted], row.verdict.token_id])
            kept, text = committed.token_ids, committed.text
            logprobs = score(sequence, logits[row.first_drawn : row.first_drawn + len(kept)], kept)
            if row.block.token_ids:
                sequence.speculation.add(len(row.block.token_ids), row.verdict.accepted)
        elif completes:
            sequence.finish_empty()
        for table, tokens in sequence.cached:
            table.rollback(len(tokens) - (1 if kept else 0))
            self._blocks.publish(table, tokens)
        if not completes:
            return None
        event = TokenEvent(
            choice=sequence.choice,
            text=text,
            token_ids=kept,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs(sequence) if first else None,
            finish_reason=sequence.finish_reason,
            cached_tokens=sequence.cached_tokens or 0,
            speculation=sequence.speculation.stats() if sequence.finish_reason else None,
        )
        if sequence.finish_reason is not None:
            self._finish(sequence)
        return sequence.request.id, event

    def _finish(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self._retire(sequence, sequence.finish_reason)
        if all(s.finish_reason for s in self._open.get(sequence.request.id, [])):
            self._open.pop(sequence.request.id, None)

    def _retire(self, sequence: Sequence, reason: FinishedReason) -> None:
        self._scheduler.remove(sequence)
        self._models[sequence.request.model].forget(sequence)
        timing, now = sequence.timing, time.monotonic()
        self._observer.on_request(
            RequestStats(
                model=sequence.request.model,
                finished_reason=reason,
                queue_seconds=(timing.started or now) - timing.arrived,
                first_token_seconds=timing.first_token and timing.first_token - timing.arrived,
                inter_token_seconds=timing.gaps,
                total_seconds=now - timing.arrived,
                speculation=sequence.speculation.stats(),
                steered=sequence.mixture is not None,
            )
        )


def _needs_no_process(drawing: SequenceOf[InFlight], states: SequenceOf[Row]) -> bool:
    """Whether every token follows from its logits, its temperature and its seed alone, by exact verification."""
    if any(row.item.sequence.is_lenient for row in drawing):
        return False
    return all(needs_temperature_at_most(state) and not is_unseeded(state) for state in states)


def _match(drawing: SequenceOf[InFlight], chosen: Iterable[int]) -> None:
    """Coupled verification of every row against the target's choices, sequence after sequence."""
    outputs = iter(chosen)
    for row in drawing:
        drafted = row.block.token_ids
        row.verdict = match_prefix([next(outputs) for _ in range(len(drafted) + 1)], drafted)


def _lenience(model: ServedModel, rows: SequenceOf[InFlight]) -> Lenience | None:
    if not any(row.item.sequence.is_lenient for row in rows):
        return None
    return Lenience([row.item.sequence.request.speculation.lenience for row in rows], model.lenience_form)


def _step_stats(
    plan: StepPlan,
    rows: SequenceOf[InFlight],
    events: SequenceOf[tuple[str, TokenEvent]],
    phases: Mapping[str, float],
) -> StepStats:
    verified = [row for row in rows if row.block.token_ids and row.verdict is not None]
    return StepStats(
        model=plan.model,
        phase_seconds=phases,
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        generated_tokens=sum(len(event.token_ids) for _, event in events),
        drafted_per_block=[len(row.block.token_ids) for row in verified],
        accepted_per_block=[row.verdict.accepted for row in verified if row.verdict is not None],
        prefix_queries=plan.prefix_queries,
        prefix_hits=plan.prefix_hits,
        preemptions=plan.preemptions,
        disabled=plan.disabled,
    )


class _Clock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._start
