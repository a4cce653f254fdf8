"""The members of a steered model beside its target: which run for a sequence, their forwards, their combination."""

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from paceline.server.decoding import arithmetic
from paceline.server.decoding.mixture import Mixture, Pair, mixture
from paceline.server.engine.batch import Batch
from paceline.server.engine.in_flight import InFlight
from paceline.server.engine.interface import check_strengths
from paceline.server.engine.kv_blocks import BlockTable
from paceline.server.engine.request import Request
from paceline.server.engine.runner import Runner, forward_all
from paceline.server.engine.sequence import MemberTrack
from paceline.server.errors import ContextLengthError, InvalidRequestError


@runtime_checkable
class Combiner(Protocol):
    """A runner that combines logits itself."""

    def combine(self, members: SequenceOf[Tensor], weights: Tensor) -> Tensor:
        """See ``arithmetic.combine``."""
        ...


@dataclass(frozen=True)
class Member:
    """What a member runs on.

    Attributes:
        runner: may be that of other members, too: they then share a forward.
        context_length: longest sequence, tokens.
    """

    name: str
    runner: Runner
    context_length: int


class Steering:
    """Pairs over members.

    Args:
        pairs: whose indices count the target as member 0.
        members: those beside the target, from index 1 on.
        vocab_size: the target's. Ids that a member lacks never come out; what it has beyond is cut.
    """

    def __init__(self, pairs: SequenceOf[Pair], members: SequenceOf[Member], *, vocab_size: int) -> None:
        self.pairs = tuple(pairs)
        self._members = dict(enumerate(members, start=1))
        self._vocab_size = vocab_size
        self._width = min([vocab_size, *(m.runner.vocab_size for m in members)])

    @property
    def first_expert(self) -> tuple[int, Member] | None:
        """Index and member of the first pair's expert that is not the base."""
        indexes = (pair.expert for pair in self.pairs)
        return next(((i, self._members[i]) for i in indexes if i in self._members), None)

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError for strengths or prompts that no sequence can have."""
        wish = request.steering
        check_strengths(wish.strengths, self.pairs)
        if wish.prompts and len(wish.prompts) != len(self._members):
            raise InvalidRequestError(
                f"expected {len(self._members)} member prompts, got {len(wish.prompts)}"
            )
        for index in self._running(request):
            member, prompt = self._members[index], self._prompt(request, index)
            wanted = len(prompt) + request.sampling.max_tokens
            if not prompt:
                raise InvalidRequestError(f"the prompt of {member.name} is empty", param="prompt")
            if wanted > member.context_length:
                raise ContextLengthError(
                    f"{member.name}, which steers this model, has a context of {member.context_length} tokens, but "
                    f"its prompt has {len(prompt)} and {request.sampling.max_tokens} more were asked for",
                    code="context_length_exceeded",
                )
            if request.sampling.prompt_logprobs is not None and len(prompt) != len(request.prompt_ids):
                raise InvalidRequestError(
                    f"log-probabilities of the prompt cannot be had, as {member.name}, which steers this model, reads "
                    "another prompt; switch steering off for the request, or echo off",
                    param="echo",
                )

    def mixture(self, request: Request) -> Mixture | None:
        """How a request's logits are combined; None if they are the target's."""
        return mixture(self.pairs, request.steering.strengths, len(self._members) + 1)

    def tracks(self, request: Request) -> list[MemberTrack]:
        """New tracks of the members that run for a choice of a request."""
        return [
            MemberTrack(
                index, list(self._prompt(request, index)), BlockTable(self._members[index].runner.layout)
            )
            for index in self._running(request)
        ]

    def blocks_needed(self, request: Request) -> int:
        """KV blocks that one choice may take at most, beside the target's."""
        return sum(
            self._members[i].runner.layout.blocks_for(
                len(self._prompt(request, i)) + request.sampling.max_tokens
            )
            for i in self._running(request)
        )

    @torch.inference_mode()
    def forward(self, target: Runner, batch: Batch, rows: SequenceOf[InFlight]) -> Tensor:
        """Run the target and all members over a step's rows, and combine what they say.

        Args:
            target: the target's runner.
            batch: its rows; those of members that share its runner are added.
            rows: the step's sequences.

        Returns:
            fp32 [rows that the batch wanted, vocab_size], as the target alone would return it.
        """
        wanted = len(batch.wanted)
        batches: dict[Runner, Batch] = {target: batch}
        places: dict[MemberTrack, slice] = {}
        for row in rows:
            for index, track in row.item.sequence.tracks.items():
                own = batches.setdefault(self._members[index].runner, Batch())
                places[track] = _add(own, track, row)
        said = forward_all({runner: own for runner, own in batches.items() if own.tokens})
        if not wanted:
            return torch.empty(0, self._vocab_size, device=target.device)
        spoken = {
            track: _joined(track, said[self._members[track.member].runner][place])
            for track, place in places.items()
            if place.stop > place.start
        }
        logits = said[target][:wanted]
        self._combine_(
            logits, target, [row for row in rows if row.item.sequence.mixture and row.count], spoken
        )
        return logits

    def _combine_(
        self, logits: Tensor, target: Runner, rows: SequenceOf[InFlight], spoken: Mapping[MemberTrack, Tensor]
    ) -> None:
        """Replace the steered rows of ``logits``, fp32 [wanted, vocab_size], by their combinations.

        Args:
            rows: the steered ones that have logits.
            spoken: logits of their members, fp32 [row.count, the member's vocabulary].
        """
        if not rows:
            return
        at = [i for row in rows for i in range(row.logits.start, row.logits.stop)]
        base = (logits if len(at) == len(logits) else logits[at])[:, : self._width]
        members = [base, *(self._matrix(index, rows, spoken, base) for index in self._members)]
        mixtures = [m for row in rows if (m := row.item.sequence.mixture) for _ in range(row.count)]
        combine = target.combine if isinstance(target, Combiner) else arithmetic.combine
        combined = combine(members, arithmetic.weight_rows(mixtures, base.device))
        arithmetic.restrict_(combined, members, mixtures)
        logits[at, : self._width] = combined
        logits[at, self._width :] = -math.inf

    def _matrix(
        self, index: int, rows: SequenceOf[InFlight], spoken: Mapping[MemberTrack, Tensor], base: Tensor
    ) -> Tensor:
        """What a member says for all rows, zeros where it does not run; fp32, of the shape of ``base``."""
        parts = []
        for row in rows:
            track = row.item.sequence.tracks.get(index)
            own = base.new_zeros(row.count, self._width) if track is None else spoken[track]
            parts.append(own[:, : self._width])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _running(self, request: Request) -> tuple[int, ...]:
        mixed = self.mixture(request)
        return () if mixed is None else mixed.members

    @staticmethod
    def _prompt(request: Request, index: int) -> SequenceOf[int]:
        return request.steering.prompts[index - 1] if request.steering.prompts else request.prompt_ids


def _add(batch: Batch, track: MemberTrack, row: InFlight) -> slice:
    """Rows of a member for a sequence, but for draft tokens that it made and has run itself.

    Returns:
        Where their logits will lie in the forward's result.
    """
    known = row.item.chunk(track.table, track.tokens)
    ahead = max(0, track.table.num_computed - len(track.tokens))
    tokens = [*known, *row.block.token_ids[ahead:]]
    said = 0 if track.drafted_logits is None else len(track.drafted_logits)
    place = batch.add(track.table, tokens, num_wanted=row.count - said)
    track.table.num_computed += len(tokens)
    return place


def _joined(track: MemberTrack, logits: Tensor) -> Tensor:
    """What a member said when it drafted, and what it says now."""
    if track.drafted_logits is None:
        return logits
    drafted, track.drafted_logits = track.drafted_logits, None
    return torch.cat([drafted, logits])
