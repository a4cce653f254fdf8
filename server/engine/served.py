"""A served model as the engine steps it: the target's runner, its proposers and its speculation settings."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

import torch

from paceline.server.decoding.policy import MAX_DRAFT_TOKENS, FixedPolicy
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.interface import ModelInfo
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.proposers import EMPTY_BLOCK, Proposer
from paceline.server.engine.request import Request
from paceline.server.engine.runner import Runner
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import Sequence
from paceline.server.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True)
class ServedModel:
    """One entry of ``/v1/models``.

    Attributes:
        rule: verification rule for unseeded sampled requests; greedy and seeded ones need none.
    """

    info: ModelInfo
    runner: Runner
    proposers: Mapping[str, Proposer]
    policy: FixedPolicy
    rule: Literal["token", "block"]

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

    def layouts(self, request: Request) -> list[MemberLayout]:
        """Of every member that stores K and V for the request."""
        name, _ = self._speculation(request)
        draft = self.proposers[name].layout if name is not None else None
        return [self.runner.layout] if draft is None else [self.runner.layout, draft]

    def sequences(self, request: Request) -> list[Sequence]:
        """One sequence per choice, in choice order."""
        name, length = self._speculation(request)
        proposer = self.proposers[name] if name is not None else None
        made: list[Sequence] = []
        for choice in range(request.n):
            made.append(
                Sequence(
                    request,
                    choice,
                    tokenizer=self.info.tokenizer,
                    target=self.runner.layout,
                    draft=proposer.layout if proposer is not None else None,
                    proposer=name,
                    max_draft_tokens=length,
                    context_length=self.info.context_length,
                    leader=made[0] if made else None,
                )
            )
        return made

    def _speculation(self, request: Request) -> tuple[str | None, int]:
        """Name of the request's proposer (None: no speculation) and its block length."""
        name = request.speculation.draft or self.info.default_draft
        length = self.policy.block_length(request.speculation)
        return (name, length) if length > 0 else (None, 0)

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """A draft block per item, each from the proposer of its sequence."""
        blocks = [EMPTY_BLOCK] * len(items)
        for name, proposer in self.proposers.items():
            mine = [i for i, item in enumerate(items) if item.sequence.proposer == name]
            if mine:
                for i, block in zip(mine, proposer.propose([items[i] for i in mine], generator), strict=True):
                    blocks[i] = block
        return blocks

    def forget(self, sequence: Sequence) -> None:
        """Drop what the proposer keeps for a finished sequence."""
        if sequence.proposer is not None:
            self.proposers[sequence.proposer].forget(sequence)
