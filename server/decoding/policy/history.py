"""What the policy remembers of one sequence."""

from dataclasses import dataclass, field
from typing import Literal

from paceline.server.decoding.policy.acceptance import Acceptance

#: Why a sequence that could have speculated did not, in one step (``paceline:spec_disabled_total``). "request": its
#: request switched it off; "no_match": the text ends like nothing before; "low_acceptance": too few tokens would be
#: accepted, even alone in the batch; "batch_cost": alone it would pay, not beside so many others; "catch_up": what the
#: draft has not computed yet costs more than it can still save; "no_room": no KV blocks are free.
Reason = Literal["request", "no_match", "low_acceptance", "batch_cost", "catch_up", "no_room"]
#: A rejected sequence is first probed after this many steps; every probe in vain doubles the wait.
FIRST_PROBE_STEPS = 8


@dataclass(slots=True)
class History:
    """Of one sequence, from its first to its last decode step.

    Attributes:
        acceptances: estimate per ``Option.key`` that was ever verified.
        idle_steps: decode steps since the last verified block.
        probe_after: idle steps after which a probe is due.
        probing: the present step's block is a probe.
        reason: why the last decision was not to draft.
    """

    acceptances: dict[tuple[str, int], Acceptance] = field(default_factory=dict)
    idle_steps: int = 0
    probe_after: int = FIRST_PROBE_STEPS
    probing: bool = False
    reason: Reason | None = None

    def begin_step(self) -> None:
        """Another decode step, in which no block has been verified yet."""
        self.probing = False
        self.idle_steps += 1
