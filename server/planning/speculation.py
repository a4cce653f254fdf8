"""When drafting pays, and how much: tau / (c g + v) per batch size.

tau = (1 - alpha^(g+1)) / (1 - alpha) tokens come out of a block of g drafted ones (Leviathan et al., arXiv:2211.17192,
acceptance taken to be independent of the position); c is a draft forward and v the verification of g + 1 rows, both
over a decode step without a draft at the same batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.server.decoding.policy.lengths import LEAST_WIN
from paceline.server.planning.footprint import Footprint
from paceline.server.planning.roofline import Machine, Work, decode_seconds, forward_seconds


@dataclass(frozen=True, slots=True)
class Draft:
    """How blocks are drafted.

    Attributes:
        model: None drafts for nothing (n-grams).
        alpha: chance that a draft token is accepted if all before it were, 0..1.
        max_tokens: longest block.
    """

    name: str
    model: Footprint | None
    alpha: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of a batch.

    Attributes:
        sequences: that decode together; need not be whole where it is a mean.
        draft_tokens: g; 0 is no speculation.
        seconds: the whole step, drafting included.
        tau: tokens that each sequence gets of it.
        c: a draft forward, and v: the verification, over the step without a draft.
    """

    sequences: float
    draft_tokens: int
    seconds: float
    tau: float
    c: float = 0.0
    v: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences * self.tau / self.seconds


def tau(alpha: float, draft_tokens: int) -> float:
    """Expected tokens of a block: the accepted ones and one more."""
    return draft_tokens + 1.0 if alpha == 1.0 else (1.0 - alpha ** (draft_tokens + 1)) / (1.0 - alpha)


def step(
    machine: Machine,
    target: Footprint,
    sequences: float,
    context: float,
    draft: Draft | None = None,
    draft_tokens: int = 0,
) -> Step:
    """A decode step with blocks of ``draft_tokens`` tokens.

    Args:
        context: tokens that each sequence has, on average.
    """
    over = machine.overheads
    plain = decode_seconds(machine, target, sequences, context) + over.around(sequences, sequences)
    if draft is None or not draft_tokens:
        return Step(sequences, 0, plain, 1.0)
    rows = draft_tokens + 1
    verify = decode_seconds(machine, target, sequences, context, rows) + over.around(
        sequences, sequences * rows
    )
    drafting = draft_seconds(machine, draft, sequences, context, draft_tokens)
    drafting += over.drafting + over.drafted * sequences
    return Step(
        sequences,
        draft_tokens,
        verify + drafting,
        tau(draft.alpha, draft_tokens),
        c=drafting / draft_tokens / plain,
        v=verify / plain,
    )


def draft_seconds(
    machine: Machine, draft: Draft, sequences: float, context: float, draft_tokens: int
) -> float:
    """The draft's forwards of a block, one per token.

    The first one also computes what the last step committed and the draft has not: one row if only what it drafted
    itself came out, one more if all of that did; all tau of them if it reads the target's states. Several devices share
    the draft's work, or each does all of it and spares the all-reduces, whichever is faster.
    """
    model = draft.model
    if model is None:
        return 0.0
    reads_state = model.config.reads_state
    first = tau(draft.alpha, draft_tokens) if reads_state else 1.0 + draft.alpha**draft_tokens

    def on(one: Machine) -> float:
        opening = forward_seconds(one, model, Work(first * sequences, sequences, sequences, context)).total
        return opening + (draft_tokens - 1) * decode_seconds(one, model, sequences, context)

    return min(on(machine), on(machine.alone))


def best_step(
    machine: Machine, target: Footprint, sequences: float, context: float, draft: Draft | None
) -> Step:
    """The step of the most tokens per second; drafting must win as much as the serving policy asks for."""
    plain = step(machine, target, sequences, context)
    if draft is None:
        return plain
    lengths: Sequence[int] = range(1, draft.max_tokens + 1)
    drafted = [step(machine, target, sequences, context, draft, g) for g in lengths]
    best = max(drafted, key=lambda one: one.tokens_per_second, default=plain)
    return best if best.tokens_per_second > LEAST_WIN * plain.tokens_per_second else plain


def pays_up_to(machine: Machine, target: Footprint, context: float, draft: Draft, limit: int) -> int | None:
    """The greatest batch of at most ``limit`` sequences that drafts, found by bisection; None if not even one does.

    A larger batch makes verification dearer, never cheaper, so that drafting that has stopped to pay stays so.
    """

    def pays(sequences: int) -> bool:
        return best_step(machine, target, sequences, context, draft).draft_tokens > 0

    if not pays(1):
        return None
    low, high = 1, limit + 1  # low pays, high does not or is out of the range
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
