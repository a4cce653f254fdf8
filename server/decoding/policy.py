"""How many tokens to draft for a sequence now. Pure Python; proposers and the scheduler only see the
number."""

from dataclasses import dataclass

from paceline.server.engine.request import SpeculationParams

#: Longest draft block a request may ask for: beyond it verification costs more than one forward saves.
MAX_DRAFT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """The same block length for every step: the request's wish, else the model's configuration."""

    max_draft_tokens: int

    def block_length(self, wish: SpeculationParams) -> int:
        """Draft tokens per step for a request; 0 turns speculation off."""
        if not wish.enabled:
            return 0
        return self.max_draft_tokens if wish.max_draft_tokens is None else wish.max_draft_tokens
