"""The state of one choice of one request, from queue to final event. Knows tokens and tables, no tensors.

States: waiting -> running -> finished, and running -> waiting again when preempted (its K and V are recomputed).
"""

import itertools
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from paceline.server.decoding.mixture import Mixture
from paceline.server.decoding.policy import History
from paceline.server.engine.interface import Tokenizer
from paceline.server.engine.kv_blocks import BlockTable, MemberLayout
from paceline.server.engine.output_text import OutputText
from paceline.server.engine.request import FinishReason, Request, SpeculationStats, TokenLogprob

_arrivals = itertools.count()
#: Output that a sequence is expected to have left at least, when a draft has to catch up first.
_LEAST_EXPECTED_TOKENS = 64


@dataclass(slots=True)
class SpeculationCounter:
    """Running totals behind ``SpeculationStats``."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        """Count one verified block."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        self.histogram.extend([0] * (drafted + 1 - len(self.histogram)))
        self.histogram[accepted] += 1

    def stats(self) -> SpeculationStats:
        """The totals so far."""
        return SpeculationStats(self.steps, self.drafted, self.accepted, tuple(self.histogram))


@dataclass(slots=True, eq=False)
class MemberTrack:
    """A steering member's own view of a sequence.

    Attributes:
        member: its index among the model's members.
        tokens: its own prompt, then the sequence's committed output.
        table: its K and V.
        drafted_logits: what it said about the draft tokens of this step, if it drafted them: a tensor, which
            nothing here looks into, fp32 [drafted, vocab], or None.
    """

    member: int
    tokens: list[int]
    table: BlockTable
    drafted_logits: Any = None


class Sequence:
    """One choice.

    Attributes:
        tokens: prompt and committed output.
        target: block table of the target; ``draft`` that of the draft model, if one drafts for this sequence.
        sources: names of the proposers that may draft for it, preferred first; none if it does not speculate.
        draft_history: what the model's policy remembers of it.
        leader: the request's first choice, whose prefill the others wait for to share its blocks.
        mixture: how its logits are combined; None takes the target's as they are.
        tracks: the members beside the target that run for it, by index.
    """

    def __init__(
        self,
        request: Request,
        choice: int,
        *,
        tokenizer: Tokenizer,
        target: MemberLayout,
        draft: MemberLayout | None = None,
        sources: SequenceOf[str] = (),
        max_draft_tokens: int = 0,
        context_length: int,
        leader: "Sequence | None" = None,
        mixture: Mixture | None = None,
        tracks: SequenceOf[MemberTrack] = (),
    ) -> None:
        self.request, self.choice = request, choice
        self.sampling = request.sampling
        self.arrival = next(_arrivals)
        self.tokens = list(request.prompt_ids)
        self.prompt_tokens = len(self.tokens)
        self.target = BlockTable(target)
        self.draft = BlockTable(draft) if draft is not None else None
        self.sources, self.max_draft_tokens = tuple(sources), max_draft_tokens
        self.draft_history = History()
        self.leader = leader
        self.mixture = mixture
        self.tracks = {track.member: track for track in tracks}
        self.max_tokens = min(self.sampling.max_tokens, context_length - self.prompt_tokens)
        self.finish_reason: FinishReason | None = None
        self.cached_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.speculation = SpeculationCounter()
        self.timing = Timing()
        self._text = OutputText(request, tokenizer, max_tokens=self.max_tokens)
        self.masked_until_min_tokens = tuple(sorted(self._text.stop_ids))

    @property
    def verifying(self) -> list[tuple[BlockTable, list[int]]]:
        """Tables without which no token can be drawn, each with its tokens: the target's first, then the members'."""
        return [(self.target, self.tokens), *((track.table, track.tokens) for track in self.tracks.values())]

    @property
    def cached(self) -> list[tuple[BlockTable, list[int]]]:
        """Tables of every member and, where it has begun, of the draft model, each with its tokens."""
        if self.draft is None or not self.draft.blocks:
            return self.verifying
        return [*self.verifying, (self.draft, self.tokens)]

    @property
    def remaining(self) -> int:
        """Known tokens that still have to be computed by the member that lacks most."""
        return max(len(tokens) - table.num_computed for table, tokens in self.verifying)

    @property
    def output_tokens(self) -> int:
        """Committed output length."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def expected_tokens(self) -> int:
        """A guess of how many tokens will still come: as many again as came so far, at least 64, within the limit."""
        return min(self.max_tokens - self.output_tokens, max(_LEAST_EXPECTED_TOKENS, self.output_tokens))

    @property
    def draft_is_idle(self) -> bool:
        """Whether nothing was drafted for it in the last step; 1 idle step is the one being planned."""
        return self.draft_history.idle_steps > 1

    @property
    def is_lenient(self) -> bool:
        """Whether draft tokens may be accepted beyond what exact verification accepts."""
        return self.request.speculation.lenience < 1

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token still has to be computed, or nothing is generated yet."""
        return self.remaining > 1 or self.output_tokens == 0

    @property
    def takes_raw_argmax(self) -> bool:
        """Whether the next token is simply the most likely one: greedy, and nothing to process before."""
        s = self.sampling
        return (
            s.temperature == 0
            and not s.logit_bias
            and s.repetition_penalty == 1
            and s.presence_penalty == 0
            and s.frequency_penalty == 0
            and self.output_tokens >= s.min_tokens
        )

    @property
    def waits_for_leader(self) -> bool:
        """Whether a sibling is computing the prompt that this choice can share."""
        leader = self.leader
        return leader is not None and leader.finish_reason is None and leader.output_tokens == 0

    @property
    def draft_limit(self) -> int:
        """How many draft tokens can be of use in the next step."""
        if not self.sources:
            return 0
        return max(0, min(self.max_draft_tokens, self.max_tokens - self.output_tokens - 1))

    def commit(self, token_ids: SequenceOf[int]) -> "Committed":
        """Append new tokens up to the first stop condition.

        Sets ``finish_reason`` if one is met; tokens after it are dropped.
        """
        kept: list[int] = []
        text = ""
        for token in token_ids:
            kept.append(token)
            for _, tokens in self.verifying:
                tokens.append(token)
            text += self._text.take(token)
            self.finish_reason = self._text.finish_reason
            if self.finish_reason is not None:
                break
        self.timing.tokens(len(kept))
        return Committed(tuple(kept), text)

    def finish_empty(self) -> None:
        """End a sequence that was only scored (``max_tokens`` 0)."""
        self.finish_reason = "length"


@dataclass(frozen=True, slots=True)
class Committed:
    """What ``Sequence.commit`` kept: token ids, and the text that is final now."""

    token_ids: tuple[int, ...]
    text: str


class Timing:
    """Wall-clock marks of one choice, seconds on the monotonic clock."""

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.started: float | None = None
        self.first_token: float | None = None
        self.gaps: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        """The choice was scheduled (kept from the first time on)."""
        self.started = self.started or time.monotonic()

    def elapsed(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived

    def tokens(self, count: int) -> None:
        """``count`` tokens were committed now; a step's gap is spread evenly over its tokens."""
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            self.gaps.extend([0.0] * (count - 1))
        else:
            self.gaps.extend([(now - self._last) / count] * count)
        self._last = now
