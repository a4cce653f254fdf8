"""When a crowd that its draft models do not serve need not be asked again at once.

Where drafting with a model does not pay, little changes from one step to the next, but deciding for 16 sequences costs
1 ms of a step of 15. So a crowd in which no draft model is used rests from asking them, twice as long each time in a
row. What n-grams find changes with every token, so they go on being asked, unless nobody drafts at all.
"""

from collections.abc import Sequence

from paceline.server.decoding.policy.choices import Decision
from paceline.server.decoding.policy.history import Reason

#: Deciding for fewer sequences is cheap, and what could draft for them should be tried at once.
LEAST_CROWD = 4
LONGEST_REST_STEPS = 32
#: A crowd that has shrunk to this share is another one; one that lost a member is mostly about to get the next.
_SAME_CROWD = 0.75
#: What does not end with the next token, unlike a text without a match.
_LASTING: frozenset[Reason | None] = frozenset({None, "low_acceptance", "batch_cost", "catch_up"})


class Rest:
    """The rest of one model's batch.

    Attributes:
        is_total: during this rest nobody drafts, n-grams or not.
    """

    def __init__(self) -> None:
        self.is_total = False
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
        """What was decided when all were asked, probes apart: how long to rest now."""
        by_model = any(d.option is not None and d.option.by_model for d in decisions)
        if by_model or len(decisions) < LEAST_CROWD:
            self._left = self._length = 0
            return
        self._length = min(2 * self._length or 1, LONGEST_REST_STEPS)
        self._left, self._crowd = self._length, len(decisions)
        self.is_total = all(not d.length and d.reason in _LASTING for d in decisions)
