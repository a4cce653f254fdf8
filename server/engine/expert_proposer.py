"""Draft tokens of a steered model's own expert, whose logits the combination needs anyway (2310.12962, section 3.4).

The expert drafts on its track: it runs the newest token and all but the last draft token, and what it says is kept for
the combination. The step's forward of the members then runs the last draft token only, so that nothing is run twice.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor
from torch.nn.functional import pad

from paceline.server.decoding.policy import Option
from paceline.server.decoding.sampler import draw, probabilities, process
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.proposers import EMPTY_BLOCK, DraftWork, make_row
from paceline.server.engine.runner import Runner
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import MemberTrack, Sequence


class ExpertProposer:
    """Drafts with a steering member for sequences that the member steers.

    Args:
        runner: the member's.
        member: its index among the model's members.
        vocab_size: the target's; the member's logits are cut or padded with -inf to it.
    """

    def __init__(self, runner: Runner, member: int, *, vocab_size: int) -> None:
        self.layout: MemberLayout | None = None  # it uses the member's own blocks
        self._runner, self._member, self._vocab_size = runner, member, vocab_size
        self._work = DraftWork()

    def option(self, name: str, sequence: Sequence) -> Option | None:
        """See ``Proposer.option``."""
        if not sequence.draft_limit or self._member not in sequence.tracks:
            return None
        return Option(name, by_model=True, missing=1)

    def take_work(self) -> DraftWork | None:
        """See ``Proposer.take_work``."""
        work, self._work = self._work, DraftWork()
        return work

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """See ``Proposer.propose``; blocks of sampled requests carry the distributions they were drawn from."""
        blocks = [_Block(item, item.sequence.tracks[self._member]) for item in items if item.draft_tokens]
        pending = list(blocks)
        while pending:
            self._extend(pending, generator)
            pending = [block for block in pending if len(block.tokens) < block.item.draft_tokens]
        lengths = [len(block.tokens) for block in blocks]
        self._work = DraftWork(max(lengths, default=0), sum(lengths))
        made = {id(block.item): block.finish() for block in blocks}
        return [made.get(id(item), EMPTY_BLOCK) for item in items]

    def forget(self, sequence: Sequence) -> None:
        """See ``Proposer.forget``; all state is on the sequence's track."""

    def _extend(self, pending: SequenceOf["_Block"], generator: torch.Generator) -> None:
        """One more draft token for every block."""
        batch = Batch()
        for block in pending:
            batch.add(block.track.table, [block.newest], num_wanted=1)
            block.track.table.num_computed += 1
        logits = self._runner.forward(batch)
        rows = [make_row(block.item.sequence, block.tokens) for block in pending]
        scores = process(self._aligned(logits), rows)
        tokens = draw(scores, rows, generator).tolist()
        for i, (block, token) in enumerate(zip(pending, tokens, strict=True)):
            block.tokens.append(token)
            block.logits.append(logits[i : i + 1])
            if block.needs_probs:
                block.probs.append(probabilities(scores[i : i + 1], rows[i : i + 1]))

    def _aligned(self, logits: Tensor) -> Tensor:
        missing = self._vocab_size - logits.shape[1]
        return (
            pad(logits, (0, missing), value=float("-inf")) if missing > 0 else logits[:, : self._vocab_size]
        )


class _Block:
    """A draft block under construction."""

    def __init__(self, item: Scheduled, track: MemberTrack) -> None:
        self.item, self.track = item, track
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []
        self.probs: list[Tensor] = []
        sampling = item.sequence.sampling
        self.needs_probs = sampling.temperature > 0 and sampling.seed is None

    @property
    def newest(self) -> int:
        """The token to run for the next draft token."""
        return self.tokens[-1] if self.tokens else self.track.tokens[-1]

    def finish(self) -> DraftBlock:
        """The block; what the member said about it is on its track."""
        self.track.drafted_logits = torch.cat(self.logits)
        return DraftBlock(tuple(self.tokens), torch.cat(self.probs) if self.needs_probs else None)
