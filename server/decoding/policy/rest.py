"""When a crowd in which nobody drafts need not be asked again at once.

Where drafting does not pay, little changes from one step to the next, but gathering options and deciding for 16
sequences costs 0.4 ms of a step of 9. So a crowd that decided not to draft rests, twice as long each time in a row.
"""

from collections.abc import Sequence

from paceline.server.decoding.policy.choices import Decision
from paceline.server.decoding.policy.history import Reason

#: Deciding for fewer sequences is cheap, and what could draft for them should be tried at once.
LEAST_CROWD = 4
LONGEST_REST_STEPS = 16
#: A crowd that has shrunk to this share is another one; one that lost a member is mostly about to get the next.
_SAME_CROWD = 0.75
#: What does not end with the next token, unlike a text without a match.
_LASTING: frozenset[Reason | None] = frozenset({None, "low_acceptance", "batch_cost", "catch_up"})


class Rest:
    """The rest of one model's batch."""

    def __init__(self) -> None:
        self._left = self._length = 0
        self._crowd = 0

    def take(self, sequences: int) -> bool:
        """Whether a step of so many sequences belongs to the rest; a crowd that has shrunk is to be asked."""
        if not self._left or sequences < _SAME_CROWD * self._crowd:
            self._left = 0
            return False
        self._left -= 1
        return True

    def settle(self, decisions: Sequence[Decision]) -> None:
        """What was decided, probes apart: how long to rest now."""
        lasting = all(not d.length and d.reason in _LASTING for d in decisions)
        if not lasting or len(decisions) < LEAST_CROWD:
            self._left = self._length = 0
            return
        self._length = min(2 * self._length or 1, LONGEST_REST_STEPS)
        self._left, self._crowd = self._length, len(decisions)
