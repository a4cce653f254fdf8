"""How many tokens to draft for a sequence now, and from which source. Pure Python that knows only numbers.

``choices`` holds what goes in and out and the fixed policy; ``adaptive`` weighs expected tokens against predicted
time, from the estimates of ``acceptance`` and ``costs``; ``probes`` looks now and then whether a choice of 0 still
holds, and ``rest`` spares a crowd in which nobody drafts the asking. A decision may depend on the prefix and on past
statistics, never on the token drawn at the position in question: then the output keeps its distribution, and seeded
requests their text.
"""

from paceline.server.decoding.policy.adaptive import AdaptivePolicy
from paceline.server.decoding.policy.choices import (
    CATCH_UP_TOKENS,
    MAX_DRAFT_TOKENS,
    Candidate,
    Decision,
    FixedPolicy,
    Option,
    Policy,
    StepWork,
)
from paceline.server.decoding.policy.history import History, Reason

__all__ = [
    "CATCH_UP_TOKENS",
    "MAX_DRAFT_TOKENS",
    "AdaptivePolicy",
    "Candidate",
    "Decision",
    "FixedPolicy",
    "History",
    "Option",
    "Policy",
    "Reason",
    "StepWork",
]
