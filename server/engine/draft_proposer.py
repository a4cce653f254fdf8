"""Draft tokens of a small model that has its own KV cache.

Drafting is batched: a block of n tokens costs n forwards of the draft for all sequences together. Runners that can
(``BlockDrafter``) do a whole block in one native call; with others every token is a forward and a draw in torch.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.kernels.cpu.drafting import Drafted
from paceline.server.decoding.draws import DrawMaker
from paceline.server.decoding.policy import CATCH_UP_TOKENS, Option
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import draw, probabilities, process
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.proposers import EMPTY_BLOCK, DraftWork, make_row
from paceline.server.engine.runner import BlockDrafter, FeatureRunner, KeptStates, Runner, StateReader
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import Sequence
from paceline.server.models.attention import SequenceRows


class DraftModelProposer:
    """Drafts with a small model of the same tokenizer.

    The draft computes a sequence's known tokens only when it is to draft for it, under the same token budget as the
    target's prefill; a sequence whose draft has not caught up yet is not drafted for.

    Args:
        runner: the draft model.
        vocab_size: the target's; draft logits are cut or padded with -inf to it.
        max_batch_tokens: known tokens the draft may compute per step.
        num_proposable: ids that the draft has logits for; None is all.
        target: keeps the states for a draft that reads them (``ModelConfig.reads_state``), None for others. Rows of
            known tokens read the target's states; rows of draft tokens the draft's own, and these rows are forgotten
            after the block: accepted tokens are computed anew from the target's states when they are known text.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        vocab_size: int,
        max_batch_tokens: int,
        num_proposable: int | None = None,
        target: StateReader | None = None,
    ) -> None:
        self.layout: MemberLayout | None = runner.layout
        self._num_proposable = num_proposable or runner.vocab_size
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_batch_tokens = max_batch_tokens
        self._target, self._reader = target, runner if isinstance(runner, FeatureRunner) else None
        self._native = _NativeBlocks(runner, vocab_size) if isinstance(runner, BlockDrafter) else None
        self._work = DraftWork()

    def option(self, name: str, sequence: Sequence) -> Option | None:
        """See ``Proposer.option``."""
        assert sequence.draft is not None
        if not sequence.draft_limit or not self._can_propose(sequence):
            return None
        missing = len(sequence.tokens) - sequence.draft.num_computed
        return Option(name, by_model=True, missing=max(1, missing))

    def take_work(self) -> DraftWork | None:
        """See ``Proposer.take_work``."""
        work, self._work = self._work, DraftWork()
        return work

    def propose(self, items: SequenceOf[Scheduled], generator: torch.Generator) -> list[DraftBlock]:
        """See ``Proposer.propose``; blocks of sampled requests carry the distributions they were drawn from."""
        batch, drafting, kept = self._catch_up(items)
        self._work = _work(batch, drafting)
        if self._native is not None and drafting:
            self._native.draft(batch, drafting, generator, kept)
        elif batch.tokens:
            batch.features = None if kept is None else kept.read()
            self._draft(batch, drafting, generator)
        if self._target is not None:
            _forget_drafted(drafting)
        blocks = {id(d.item): d.block() for d in drafting}
        return [blocks.get(id(item), EMPTY_BLOCK) for item in items]

    def forget(self, sequence: Sequence) -> None:
        """See ``Proposer.forget``; all state is in the sequence's block table."""

    def _catch_up(self, items: SequenceOf[Scheduled]) -> tuple[Batch, list["_Drafting"], KeptStates | None]:
        """The batch of known tokens that the draft lacks, who drafts after it (its wanted rows, in order), and the
        batch's features where the draft reads states."""
        batch, budget, drafting = Batch(), self._max_batch_tokens, []
        before: list[SequenceRows] = []
        for item in items:
            table, sequence = item.sequence.draft, item.sequence
            assert table is not None
            table.rollback(len(sequence.tokens) - 1)  # the newest token's logits are needed in any case
            missing = sequence.tokens[table.num_computed :]
            chunk = missing[:budget]
            if not chunk:
                continue
            budget -= len(chunk)
            ready = len(chunk) == len(missing) and self._can_propose(sequence)
            batch.add(table, self._known(chunk), num_wanted=int(ready))
            table.num_computed += len(chunk)
            rows = batch.sequences[-1]
            before.append(SequenceRows(rows.first_row, rows.count, rows.start - 1, sequence.target.blocks))
            if ready:
                drafting.append(_Drafting(item, len(batch.sequences) - 1))
        return batch, drafting, None if self._target is None else KeptStates(self._target, before)

    def _can_propose(self, sequence: Sequence) -> bool:
        """False where stop ids that are masked for now may be all that a draft of few ids knows."""
        masked = sequence.masked_until_min_tokens if sequence.sampling.min_tokens else ()
        return len(masked) < self._num_proposable

    def _draft(self, batch: Batch, drafting: SequenceOf["_Drafting"], generator: torch.Generator) -> None:
        logits, states = self._run(batch)
        pending = list(drafting)
        while pending:
            self._draw(pending, logits, generator)
            left = [i for i, d in enumerate(pending) if len(d.tokens) < d.item.draft_tokens]
            pending = [pending[i] for i in left]
            if pending:
                logits, states = self._run(self._next_rows(pending, None if states is None else states[left]))

    def _next_rows(self, pending: SequenceOf["_Drafting"], features: Tensor | None) -> Batch:
        batch = Batch(features=features)
        for drafting in pending:
            table = drafting.item.sequence.draft
            assert table is not None
            batch.add(table, self._known(drafting.tokens[-1:]), num_wanted=1)
            table.num_computed += 1
        return batch

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits over the target's vocabulary, and the states of the same rows where the draft reads states."""
        states = None
        if self._target is None:
            logits = self._runner.forward(batch)
        else:
            assert self._reader is not None
            logits, states = self._reader.forward_states(batch)
        missing = self._vocab_size - logits.shape[1]
        return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits, states

    def _known(self, tokens: SequenceOf[int]) -> list[int]:
        """Ids that the draft has an embedding for; padding ids of a wider target become 0."""
        return [t if t < self._runner.vocab_size else 0 for t in tokens]

    @staticmethod
    def _draw(pending: SequenceOf["_Drafting"], logits: Tensor, generator: torch.Generator) -> None:
        rows = [d.row() for d in pending]
        scores = process(logits, rows)
        tokens = draw(scores, rows, generator).tolist()
        needed = [i for i, d in enumerate(pending) if d.needs_probs]
        if needed:
            for i, q in zip(needed, probabilities(scores[needed], [rows[i] for i in needed]), strict=True):
                pending[i].probs.append(q)
        for drafting, token in zip(pending, tokens, strict=True):
            drafting.tokens.append(token)


class _NativeBlocks:
    """Drafts whole blocks in one native call, drawing among what the draft and the target both have."""

    def __init__(self, runner: BlockDrafter, vocab_size: int) -> None:
        ids = runner.vocab_ids
        # Ids ascend with the columns, so that what the target lacks comes last.
        self._columns = min(runner.vocab_size, vocab_size) if ids is None else int((ids < vocab_size).sum())
        self._token_ids = None if ids is None else ids[: self._columns].long()
        self._runner, self._maker = runner, DrawMaker(ids, self._columns)

    def draft(
        self,
        batch: Batch,
        drafting: SequenceOf["_Drafting"],
        generator: torch.Generator,
        kept: KeptStates | None,
    ) -> None:
        wishes = [(d.index, d.item.draft_tokens) for d in drafting]
        draws = self._maker.draws([d.row() for d in drafting], wishes, generator)
        drafted = self._runner.draft(batch, draws, self._columns, kept)
        for d, own in zip(drafting, drafted, strict=True):
            d.take(own, self._token_ids)


class _Drafting:
    """A block under construction; ``index`` is the sequence's in the catch-up batch."""

    def __init__(self, item: Scheduled, index: int) -> None:
        self.item, self.index = item, index
        self.tokens: list[int] = []
        self.probs: list[Tensor] = []
        self._whole: DraftBlock | None = None  # where one call drafted all of it
        sampling = item.sequence.sampling
        self.needs_probs = sampling.temperature > 0 and sampling.seed is None

    def take(self, drafted: Drafted, columns: Tensor | None) -> None:
        """The whole block at once; K and V of all but its last token are written."""
        self._whole = DraftBlock(tuple(drafted.tokens), drafted.probs, columns)
        assert self.item.sequence.draft is not None
        self.item.sequence.draft.num_computed += len(drafted.tokens) - 1

    def row(self) -> Row:
        return make_row(self.item.sequence, self.tokens)

    def block(self) -> DraftBlock:
        if self._whole is not None:
            return self._whole
        return DraftBlock(tuple(self.tokens), torch.stack(self.probs) if self.needs_probs else None)


def _forget_drafted(drafting: SequenceOf[_Drafting]) -> None:
    """Count only rows that were computed from the target's states."""
    for d in drafting:
        assert d.item.sequence.draft is not None
        d.item.sequence.draft.rollback(len(d.item.sequence.tokens))


def _work(batch: Batch, drafting: SequenceOf[_Drafting]) -> DraftWork:
    """What a step's drafting will have run, from its first batch."""
    if not batch.tokens:
        return DraftWork()
    forwards = max((d.item.draft_tokens for d in drafting), default=1)
    rows = len(batch.tokens) + sum(d.item.draft_tokens - 1 for d in drafting)
    return DraftWork(forwards, rows, sum(s.count for s in batch.sequences if s.count > CATCH_UP_TOKENS))
