"""Where draft tokens come from: what every source offers, and the text itself as one (n-gram lookup).

A proposer fills one draft block per scheduled sequence; an empty block means a plain decode. What a proposer suggests
never changes the distribution of the output, only the speed. Draft models are in ``draft_proposer``.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.server.decoding.ngram import NgramIndex
from paceline.server.decoding.policy import Option
from paceline.server.decoding.rows import Row
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import Sequence

EMPTY_BLOCK = DraftBlock((), None)
#: The proposer's name by which requests choose prompt lookup.
NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class DraftWork:
    """Forwards of a draft model in one step, and their token rows; ``catch_up_rows`` of them were known
    text of sequences with more than ``CATCH_UP_TOKENS`` of it."""

    forwards: int = 0
    rows: int = 0
    catch_up_rows: int = 0


class Proposer(Protocol):
    """Source of draft tokens for one served model.

    ``layout`` is that of the draft model's KV, None for proposers without one.
    """

    layout: MemberLayout | None

    def option(self, name: str, sequence: Sequence) -> Option | None:
        """What drafting for a decoding sequence would start from, ``name`` being its source; None if it cannot."""
        ...

    def take_work(self) -> DraftWork | None:
        """Work of a draft model since the last call; None without one."""
        ...

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """One block per item, at most ``item.draft_tokens`` long."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is finished; drop what is kept for it."""
        ...


class NgramProposer:
    """Proposes what followed the latest earlier occurrence of the text's last few tokens (prompt lookup)."""

    layout: MemberLayout | None = None

    def __init__(self) -> None:
        self._indexes: dict[Sequence, NgramIndex] = {}

    def option(self, name: str, sequence: Sequence) -> Option | None:
        """See ``Proposer.option``."""
        matched = self._index(sequence).match_length if sequence.draft_limit else 0
        return Option(name, strength=matched) if matched else None

    def take_work(self) -> DraftWork | None:
        """See ``Proposer.take_work``."""
        return None

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """See ``Proposer.propose``; deterministic, so blocks carry no probabilities."""
        return [self._block(item) if item.draft_tokens else EMPTY_BLOCK for item in items]

    def forget(self, sequence: Sequence) -> None:
        """See ``Proposer.forget``."""
        self._indexes.pop(sequence, None)

    def _block(self, item: Scheduled) -> DraftBlock:
        return DraftBlock(self._index(item.sequence).propose(item.draft_tokens), None)

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.setdefault(sequence, NgramIndex())
        index.extend(sequence.tokens[len(index) :])
        return index


def make_row(sequence: Sequence, drafted: SequenceOf[int]) -> Row:
    """The sampling state of the token that follows a sequence's committed tokens and ``drafted``."""
    return Row(
        sampling=sequence.sampling,
        prompt_ids=sequence.request.prompt_ids,
        output_ids=sequence.tokens[sequence.prompt_tokens :] + list(drafted),
        masked_until_min_tokens=sequence.masked_until_min_tokens,
        choice=sequence.choice,
        position=len(sequence.tokens) + len(drafted),
    )
