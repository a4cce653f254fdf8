"""What the policy remembers of one sequence."""

from dataclasses import dataclass, field

from paceline.server.decoding.policy.acceptance import Acceptance

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
    """

    acceptances: dict[tuple[str, int], Acceptance] = field(default_factory=dict)
    idle_steps: int = 0
    probe_after: int = FIRST_PROBE_STEPS
    probing: bool = False
