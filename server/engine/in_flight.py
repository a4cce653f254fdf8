"""What a step carries for each scheduled sequence, from its draft block to what it tells of the result.

Owns the assembly of the ragged batch and the log-probabilities that requests ask for; the step itself is ``engine``'s.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from paceline.server.decoding.logprobs import token_logprobs
from paceline.server.decoding.verify import DraftBlock, Verdict
from paceline.server.engine.batch import Batch
from paceline.server.engine.examine import Examiner
from paceline.server.engine.request import TokenLogprob
from paceline.server.engine.scheduler import Scheduled
from paceline.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one item of a step went: known tokens that the target computed, draft tokens verified (0 if none were) and
    accepted."""

    item: Scheduled
    known: int
    drafted: int
    accepted: int


@dataclass(slots=True)
class InFlight:
    """One scheduled sequence in flight: its draft block, how many known tokens the target computes, their logits rows,
    how many of them are prompt, and the verdict."""

    item: Scheduled
    block: DraftBlock
    known_tokens: int
    logits: slice
    prompt_tokens: int
    verdict: Verdict | None = None

    @property
    def count(self) -> int:
        """Rows of logits."""
        return self.logits.stop - self.logits.start  # type: ignore[no-any-return]

    @property
    def first_drawn(self) -> int:
        """Logits row that predicts the token after all known ones; the draft tokens' rows follow it."""
        stop: int = self.logits.stop
        return stop - len(self.block.token_ids) - 1

    @property
    def is_exact_argmax(self) -> bool:
        """Whether each position's token is the argmax of its logits, and nothing else will do."""
        sequence = self.item.sequence
        return sequence.takes_raw_argmax and not (sequence.is_lenient and self.block.token_ids)

    @property
    def outcome(self) -> Outcome:
        """What the policy learns from it."""
        accepted = self.verdict.accepted if self.verdict else 0
        return Outcome(self.item, self.known_tokens, len(self.block.token_ids), accepted)


def assemble(items: SequenceOf[Scheduled], drafts: SequenceOf[DraftBlock]) -> tuple[Batch, list[InFlight]]:
    """One ragged batch of every item's known tokens and its draft block."""
    batch, rows = Batch(), []
    for item, block in zip(items, drafts, strict=True):
        sequence, start = item.sequence, item.sequence.target.num_computed
        known = item.chunk(sequence.target, sequence.tokens)
        wanted = len(block.token_ids) + 1 if item.completes else 0
        if sequence.sampling.prompt_logprobs is not None and sequence.output_tokens == 0:
            wanted = len(known) + len(block.token_ids)
        logits = batch.add(sequence.target, [*known, *block.token_ids], num_wanted=wanted)
        prompt_tokens = max(0, min(len(known), sequence.prompt_tokens - start))
        rows.append(InFlight(item, block, len(known), logits, prompt_tokens))
    return batch, rows


def show_blocks(examiner: Examiner, rows: SequenceOf[InFlight], scores: Tensor | None) -> None:
    """Show every verified block with its part of ``scores``, which hold the rows that have a verdict."""
    start = 0
    for row in rows:
        if row.verdict is None:
            continue
        stop = start + len(row.block.token_ids) + 1
        if row.block.token_ids:
            assert row.item.option is not None
            own = None if scores is None else scores[start:stop]
            request = row.item.sequence.request
            examiner.on_block(request, row.item.option.source, row.block, row.verdict.accepted, own)
        start = stop


def score(sequence: Sequence, logits: Tensor, kept: SequenceOf[int]) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities of the tokens that a step kept, if the request asks for them; logits fp32 [kept, vocab]."""
    top = sequence.sampling.logprobs
    if top is None:
        return None
    return tuple(token_logprobs(logits, kept, [top] * len(kept)))


def score_prompt(row: InFlight, logits: Tensor) -> None:
    """Collect log-probabilities of the prompt tokens that this chunk's logits predict."""
    sequence, top = row.item.sequence, row.item.sequence.sampling.prompt_logprobs
    assert top is not None
    start = sequence.target.num_computed
    following = sequence.tokens[start + 1 : start + row.known_tokens + 1]
    if start == 0:
        sequence.prompt_logprobs = [TokenLogprob(sequence.tokens[0], None)]
    scored = logits[row.logits.start : row.logits.start + len(following)]
    sequence.prompt_logprobs += token_logprobs(scored, following, [top] * len(following))


def prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprob, ...] | None:
    """Those of the prompt, for the first choice of a request that asks for them."""
    if sequence.sampling.prompt_logprobs is None or sequence.choice != 0:
        return None
    return tuple(sequence.prompt_logprobs)
