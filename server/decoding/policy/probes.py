"""When to draft one token although it should not pay, to notice that it would by now.

Two brakes: a sequence waits twice as long after every probe in vain, and all probes of a model together may lose a
small share of its time.
"""

from collections.abc import Sequence

from paceline.server.decoding.policy.history import FIRST_PROBE_STEPS, History, Reason
from paceline.server.decoding.policy.lengths import INSTANT_SECONDS
from paceline.server.decoding.policy.rest import LEAST_CROWD

#: Share of the engine's time that probes may lose; in a crowd, where each says something about one of many, less.
BUDGET_SHARE = 0.01
CROWD_SHARE = 0.004
#: Credit at the start, in steps: the first probe measures what catching up costs. Without it that stays a guess, which
#: grows faster than the credit while a draft falls behind, and the draft would never be tried again.
_FIRST_CREDIT_STEPS = 4
_MOST_SAVED_STEPS = 16
_LONGEST_WAIT_STEPS = 1024
_CROWDED_WAIT_STEPS = 64


class ProbeBudget:
    """Grants probes, and settles what they cost."""

    def __init__(self) -> None:
        self._credit_seconds = 0.0
        self._token_seconds = 0.0
        self._started = False

    def earn(self, step_seconds: float, sequences: int) -> None:
        """A step without drafting is predicted to take so long for so many sequences."""
        if not self._started and step_seconds > INSTANT_SECONDS:
            self._started, self._credit_seconds = True, _FIRST_CREDIT_STEPS * step_seconds
        share = CROWD_SHARE if sequences >= LEAST_CROWD else BUDGET_SHARE
        earned = self._credit_seconds + share * step_seconds
        self._credit_seconds = min(earned, _MOST_SAVED_STEPS * step_seconds)
        self._token_seconds = step_seconds / sequences

    def grant(self, wishes: Sequence[tuple[float, int]]) -> int | None:
        """The cheapest of ``wishes``, pairs of (seconds, index), if there is credit for it; its index."""
        if not wishes:
            return None
        seconds, index = min(wishes)
        if seconds > self._credit_seconds:
            return None
        self._credit_seconds -= seconds
        return index

    def settle(self, history: History, accepted: int) -> None:
        """A probe was verified: an accepted token pays for itself and makes the next probe due at once."""
        if accepted:
            self._credit_seconds = self._credit_seconds + accepted * self._token_seconds
            history.probe_after = 1
        else:
            history.probe_after = min(2 * max(history.probe_after, FIRST_PROBE_STEPS), _LONGEST_WAIT_STEPS)


def is_due(history: History, reason: Reason | None) -> bool:
    """Whether a sequence that does not draft has waited long enough.

    Where the batch is what makes drafting dear, acceptance is known and would be tried as soon as the batch shrinks;
    only what rows cost could have changed.
    """
    wait = max(history.probe_after, _CROWDED_WAIT_STEPS) if reason == "batch_cost" else history.probe_after
    return history.idle_steps >= wait
