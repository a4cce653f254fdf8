"""One choice's way from vLLM's outputs to token events. Pure Python; vLLM's objects are read by attribute only.

vLLM sends token ids as they come (``RequestOutputKind.DELTA``, without text). What is read of its objects is in the
protocols below, which follow ``vllm.outputs``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from paceline.server.engine.interface import FinishedReason, RequestStats, Tokenizer
from paceline.server.engine.output_text import OutputText
from paceline.server.engine.request import Request, SpeculationStats, TokenEvent, TokenLogprob
from paceline.server.engine.sequence import Timing


class Logprob(Protocol):
    """``vllm.logprobs.Logprob``: nats."""

    logprob: float


#: Position -> token id -> its log-probability: the token itself and the most likely ones.
Logprobs = Sequence[Mapping[int, Logprob] | None]


class Choice:
    """The state of one choice.

    Args:
        request: of which it is one.
        index: which.
        tokenizer: of the model.

    Attributes:
        stop_ids: what vLLM has to stop at.
        finished: whether its final event was made.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self._request, self._index = request, index
        self._text = OutputText(request, tokenizer, max_tokens=request.sampling.max_tokens)
        self._scores_only = request.sampling.max_tokens == 0
        self._timing = Timing()
        self._queue_seconds = 0.0
        self._speculation = SpeculationStats()
        self.stop_ids = self._text.stop_ids
        self.finished = False

    def take(self, output: Any) -> TokenEvent | None:
        """The event of one of vLLM's outputs (``RequestOutput``); None when it brings nothing to tell."""
        self._timing.start()
        self._note_queue(output.metrics)
        completion = output.outputs[0]
        self._note_speculation(completion)
        ids: tuple[int, ...] = () if self._scores_only else tuple(completion.token_ids)
        kept, text = self._keep(ids)
        reason = "length" if self._scores_only else self._text.finish_reason
        prompt = self._prompt_logprobs(output.prompt_logprobs)
        if not kept and reason is None and prompt is None:
            return None
        self.finished = reason is not None
        return TokenEvent(
            self._index,
            text,
            kept,
            logprobs=self._logprobs(kept, completion.logprobs),
            prompt_logprobs=prompt,
            finish_reason=reason,
            cached_tokens=output.num_cached_tokens or 0,
            speculation=self._speculation if self.finished else None,
        )

    def stats(self, reason: FinishedReason) -> RequestStats:
        """Its timings so far."""
        timing = self._timing
        first = timing.first_token
        return RequestStats(
            model=self._request.model,
            finished_reason=reason,
            queue_seconds=self._queue_seconds,
            first_token_seconds=None if first is None else first - timing.arrived,
            inter_token_seconds=timing.gaps,
            total_seconds=timing.elapsed(),
            speculation=self._speculation,
        )

    def final_stats(self) -> RequestStats:
        """Its timings, when it has finished."""
        return self.stats(self._text.finish_reason or "length")

    def _keep(self, ids: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The tokens up to the one that ends the choice, and their text."""
        kept: list[int] = []
        text = ""
        for token in ids:
            kept.append(token)
            text += self._text.take(token)
            if self._text.finish_reason is not None:
                break
        if kept:
            self._timing.tokens(len(kept))
        return tuple(kept), text

    def _logprobs(self, kept: Sequence[int], given: Logprobs | None) -> tuple[TokenLogprob, ...] | None:
        top = self._request.sampling.logprobs
        if top is None:
            return None
        assert given is not None or not kept, "vLLM left out log-probabilities"
        return tuple(_entry(token, position, top) for token, position in zip(kept, given or (), strict=False))

    def _prompt_logprobs(self, given: Logprobs | None) -> tuple[TokenLogprob, ...] | None:
        """Once, when the prompt is done; vLLM knows nothing of the first token, as nothing is before it."""
        top = self._request.sampling.prompt_logprobs
        if not given or top is None:
            return None
        ids = self._request.prompt_ids
        return tuple(_entry(token, position, top) for token, position in zip(ids, given, strict=True))

    def _note_queue(self, times: Any) -> None:
        if times is not None and times.scheduled_ts:
            self._queue_seconds = max(0.0, times.scheduled_ts - times.queued_ts)

    def _note_speculation(self, completion: Any) -> None:
        found = completion.spec_decode_metrics
        if found is not None:
            histogram = tuple(found.histogram)
            accepted = sum(length * count for length, count in enumerate(histogram))
            self._speculation = SpeculationStats(sum(histogram), found.num_draft_tokens, accepted, histogram)


def _entry(token: int, position: Mapping[int, Logprob] | None, top: int) -> TokenLogprob:
    """One token's entry; the lower id first among equals, as the native engine has it."""
    if position is None:
        return TokenLogprob(token, None)
    ranked = sorted(
        ((i, found.logprob) for i, found in position.items()), key=lambda pair: (-pair[1], pair[0])
    )
    return TokenLogprob(token, position[token].logprob, tuple(ranked[:top]))
