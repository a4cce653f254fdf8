"""The draft lengths and sources that should yield the most tokens per second, from what was measured so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.server.decoding.policy.acceptance import Acceptance, gains
from paceline.server.decoding.policy.choices import (
    CATCH_UP_TOKENS,
    Candidate,
    Decision,
    Option,
    StepWork,
)
from paceline.server.decoding.policy.costs import StepCosts, mean_context
from paceline.server.decoding.policy.history import FIRST_PROBE_STEPS, History, Reason
from paceline.server.decoding.policy.lengths import LEAST_WIN, BatchCosts, BestAlone, Pick, best_lengths
from paceline.server.decoding.policy.probes import ProbeBudget, is_due
from paceline.server.decoding.policy.rest import Rest

#: A sequence's last 16 blocks or so count, beside a prior of 10 pseudo-trials; model-wide the last 500. The first
#: blocks of all count in both, so that a weak model-wide prior would let four unlucky ones end drafting.
_SEQUENCE_KEEP, _SEQUENCE_PRIOR = 0.94, 10.0
_MODEL_KEEP, _MODEL_PRIOR = 0.998, 16.0
#: Evidence of a sequence that does not draft ages with every step, so that new one weighs more.
_IDLE_KEEP = 0.998
#: Acceptance before anything is known, of a draft model and of n-grams: hopeful, as trying is how one learns.
_FIRST_GUESS = {True: 0.7, False: 0.5}
#: A sequence whose draft is too far behind to catch up is reconsidered every so many steps.
_RECONSIDER_STEPS = 8
#: Draft tokens less likely than this never pay; leaving them out keeps the search short.
_LEAST_GAIN = 0.02


class AdaptivePolicy:
    """Maximises (expected accepted + 1) / predicted step time, summed over the sequences of a step.

    Acceptance is estimated per sequence, with the model-wide estimate as its prior; times come from the engine's own
    steps. Length 0 is a possible answer, after which drafting is only probed.
    """

    chooses_source = True

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._acceptances: dict[tuple[str, int], Acceptance] = {}
        self._probes = ProbeBudget()
        self._rest = Rest()
        self._models_rest = False  # in the coming step

    def resting(self, histories: Sequence[History]) -> list[Decision] | None:
        """See ``Policy.resting``."""
        self._models_rest = self._rest.take(len(histories))
        if not (self._models_rest and self._rest.is_total):
            return None
        for history in histories:
            history.begin_step()
        return [Decision(reason=history.reason) for history in histories]

    def decide(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """See ``Policy.decide``."""
        for candidate in candidates:
            candidate.history.begin_step()
        if not any(c.options and c.limit for c in candidates):
            return [Decision(reason="no_match" if c.limit else None) for c in candidates]
        batch = BatchCosts(self._costs, [c.context for c in candidates])
        self._probes.earn(batch.seconds(), len(candidates))
        sharing = max(1, sum(any(o.by_model for o in c.options) for c in candidates if c.limit))
        considered = [self._consider(c, batch, sharing) for c in candidates]
        alone = batch
        if len(candidates) > 1:
            lengths = best_lengths([one.pick for one in considered], batch)
            alone = BatchCosts(self._costs, [round(mean_context([c.context for c in candidates]))])
        else:  # the search has been made
            lengths = [considered[0].length_alone(batch)]
        decisions = [
            Decision(n, one.pick.option) if n else Decision(reason=one.reason or _why_not(one.pick, alone))
            for n, one in zip(lengths, considered, strict=True)
        ]
        for candidate, decision in zip(candidates, decisions, strict=True):
            candidate.history.reason = decision.reason
        if not self._models_rest:
            self._rest.settle(decisions)
        self._probe(decisions, candidates, considered, batch)
        return decisions

    def on_block(self, history: History, option: Option, drafted: int, accepted: int) -> None:
        """See ``Policy.on_block``."""
        model = self._acceptances.setdefault(option.key, Acceptance(_MODEL_KEEP, _MODEL_PRIOR))
        model.add(drafted, accepted)
        own = history.acceptances.setdefault(option.key, Acceptance(_SEQUENCE_KEEP, _SEQUENCE_PRIOR))
        own.add(drafted, accepted, age=_IDLE_KEEP ** max(0, history.idle_steps - 1))
        if history.probing:
            self._probes.settle(history, accepted)
        else:
            history.probe_after = FIRST_PROBE_STEPS
        history.idle_steps = 0

    def on_step(self, work: StepWork) -> None:
        """See ``Policy.on_step``."""
        self._costs.observe(work)

    def _rates(self, history: History, option: Option) -> tuple[float, float]:
        guess = _FIRST_GUESS[option.by_model]
        model, own = self._acceptances.get(option.key), history.acceptances.get(option.key)
        prior = (guess, guess) if model is None else model.rates((guess, guess))
        return prior if own is None else own.rates(prior)

    def _consider(self, candidate: Candidate, batch: BatchCosts, sharing: int) -> "_Considered":
        """The source that would serve a sequence best in this batch."""
        options = candidate.options if candidate.limit else []
        if not options:
            return _Considered(Pick(), None, "no_match" if candidate.limit else None)
        # Why its draft model rests was said when all were asked; whoever has come since shares the crowd's reason.
        if self._models_rest and not (options := [o for o in options if not o.by_model]):
            return _Considered(Pick(), None, candidate.history.reason or "batch_cost")
        picks = [self._pick(candidate, o) for o in options if not _rests(o, candidate.history)]
        alone = [(batch.best_alone(pick, sharing), pick) for pick in picks if pick.gains]
        usable = [(at, pick) for at, pick in alone if not self._is_behind(candidate, pick, at, batch)]
        if usable:
            at, best = max(usable, key=lambda one: one[0].rate)
            return _Considered(best, best.option, None, at)
        behind = bool(alone) or len(picks) < len(options)
        return _Considered(Pick(), options[0], "catch_up" if behind else "low_acceptance")

    def _pick(self, candidate: Candidate, option: Option) -> Pick:
        rates = self._rates(candidate.history, option)
        rows = option.missing if option.missing <= CATCH_UP_TOKENS else 1
        return Pick(option, gains(rates, candidate.limit, _LEAST_GAIN), rows)

    def _is_behind(self, candidate: Candidate, pick: Pick, alone: BestAlone, batch: BatchCosts) -> bool:
        """Whether the draft has more to catch up on than drafting can still win back.

        With drafting the sequence needs horizon / (1 + expected) more steps, each of which wins the difference of
        the two rates; catching up loses the present rate for as long as it takes.
        """
        if pick.option is None or pick.option.missing <= CATCH_UP_TOKENS:
            return False
        plain = batch.sequences / batch.seconds()
        won = (alone.rate - plain) * alone.seconds * candidate.horizon / (1 + alone.expected)
        return won < plain * self._behind_seconds(pick.option)

    def _probe(
        self,
        decisions: list[Decision],
        candidates: Sequence[Candidate],
        considered: Sequence["_Considered"],
        batch: BatchCosts,
    ) -> None:
        """Turn at most one decision not to draft into a block of one token."""
        dearer = {
            by_model: batch.seconds(1, int(by_model), 1) - batch.seconds() for by_model in (False, True)
        }
        wishes = [
            (dearer[one.probed.by_model] + self._behind_seconds(one.probed), i)
            for i, one in enumerate(considered)
            if one.probed is not None
            and not decisions[i].length
            and is_due(candidates[i].history, decisions[i].reason)
        ]
        index = self._probes.grant(wishes)
        if index is not None:
            decisions[index] = Decision(1, considered[index].probed)
            candidates[index].history.probing = True

    def _behind_seconds(self, option: Option) -> float:
        """What its draft model has to compute before it can draft."""
        return self._costs.catch_up_seconds(option.missing) if option.missing > CATCH_UP_TOKENS else 0.0


def _rests(option: Option, history: History) -> bool:
    """Whether a draft that was too far behind is left alone in this step: its case changes slowly."""
    return option.missing > CATCH_UP_TOKENS and history.idle_steps % _RECONSIDER_STEPS != 1


def _why_not(pick: Pick, alone: BatchCosts) -> Reason | None:
    """Why a source that could draft does not: would a block pay if the sequence were alone?"""
    if pick.option is None:
        return None
    pays = alone.best_alone(pick, 1).rate > LEAST_WIN / alone.seconds()
    return "batch_cost" if pays else "low_acceptance"


@dataclass(frozen=True, slots=True)
class _Considered:
    """What a sequence might draft with or probe with, why it has nothing to draft with, and its best block."""

    pick: Pick
    probed: Option | None
    reason: Reason | None
    best: BestAlone | None = None

    def length_alone(self, batch: BatchCosts) -> int:
        """``best_lengths`` of this sequence where there is no other."""
        if self.best is None or self.best.rate <= LEAST_WIN / batch.seconds():
            return 0
        return self.best.length
