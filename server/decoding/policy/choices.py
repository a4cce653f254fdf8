"""What a policy is asked and what it answers, and the policy that always answers the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.server.decoding.policy.history import History, Reason

#: Longest draft block a request may ask for: beyond it verification costs more than one forward saves.
MAX_DRAFT_TOKENS = 32

#: With more known tokens than this to compute first, a draft model has to catch up; with fewer, it just goes on.
CATCH_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Option:
    """One way to draft for a sequence in this step.

    Attributes:
        source: name of the proposer.
        strength: what else is known before drafting, the length of the n-gram that matched; 0 for draft models.
        by_model: whether drafting takes forwards of a draft model.
        missing: tokens that the draft model must compute before it can draft (1 if it is up to date).
    """

    source: str
    strength: int = 0
    by_model: bool = False
    missing: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """What shares an acceptance estimate."""
        return self.source, self.strength


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that decodes in this step.

    Attributes:
        options: none if nothing can draft for it.
        limit: most draft tokens that are wanted and of use.
        context: tokens in its KV cache.
        horizon: tokens it may still generate.
    """

    history: History
    options: Sequence[Option]
    limit: int
    context: int
    horizon: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Draft ``length`` tokens from ``option``; with length 0, why (None if nothing was wanted)."""

    length: int = 0
    option: Option | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one engine step did, and how long that took.

    Attributes:
        rows: token rows of the target's forward.
        row_context: sum over rows of the tokens before them.
        decodes_only: no prompt was computed beside them.
        target_seconds: the step without drafting.
        draft_forwards: forwards of the draft model, one after another.
        draft_rows: token rows of all of them together; ``draft_row_context`` like ``row_context``.
        catch_up_rows: rows among them that brought the draft up to date with the text.
        draft_seconds: the drafting.
    """

    rows: int
    row_context: int
    decodes_only: bool
    target_seconds: float
    draft_forwards: int = 0
    draft_rows: int = 0
    draft_row_context: int = 0
    catch_up_rows: int = 0
    draft_seconds: float = 0.0


class Policy(Protocol):
    """Chooses draft lengths; one per served model.

    Attributes:
        chooses_source: whether to offer it n-grams beside the draft that a request would get.
    """

    chooses_source: bool

    def resting(self, histories: Sequence[History]) -> list[Decision] | None:
        """One decision per sequence of the step about to run, where that takes no look at what could draft.

        None: ``decide`` is to be asked.
        """
        ...

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """One decision per sequence of the step about to run."""
        ...

    def on_block(self, history: History, option: Option, drafted: int, accepted: int) -> None:
        """A block of ``drafted`` >= 1 tokens was verified."""
        ...

    def on_step(self, work: StepWork) -> None:
        """The step is done."""
        ...


class FixedPolicy:
    """As many tokens as the request or the model's configuration says, in every step."""

    chooses_source = False

    def resting(self, histories: Sequence[History]) -> list[Decision] | None:
        """See ``Policy.resting``; never."""
        return None

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """See ``Policy.decide``."""
        return [self._decide(c) for c in candidates]

    @staticmethod
    def _decide(candidate: Candidate) -> Decision:
        if candidate.limit == 0:
            return Decision()
        if not candidate.options:
            return Decision(reason="no_match")
        return Decision(candidate.limit, candidate.options[0])

    def on_block(self, history: History, option: Option, drafted: int, accepted: int) -> None:
        """See ``Policy.on_block``; nothing is learnt."""

    def on_step(self, work: StepWork) -> None:
        """See ``Policy.on_step``; nothing is learnt."""
