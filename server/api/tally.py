"""What one API request has used so far: tokens, cache hits, speculation, and which choices are finished.

Fed with every event; renders the ``usage`` and ``metrics`` objects of the response.
"""

from itertools import zip_longest
from typing import Any

from paceline.server.engine.request import Request, SpeculationStats, TokenEvent
from paceline.server.errors import EngineError


class Tally:
    """Running totals over all prompts and choices of one API request."""

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self._prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(requests)
        self._unfinished = sum(request.n for request in requests)
        self._speculation: list[SpeculationStats] = []

    def add(self, prompt: int, event: TokenEvent) -> None:
        """Count one event of one prompt; a prompt's choices share its cached tokens."""
        self._completion_tokens += len(event.token_ids)
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], event.cached_tokens)
        if event.finish_reason is not None:
            self._unfinished -= 1
        if event.speculation is not None:
            self._speculation.append(event.speculation)

    @property
    def complete(self) -> bool:
        """Whether every choice has sent its final event."""
        return self._unfinished == 0

    def require_complete(self) -> None:
        """Raise EngineError if the engine went silent before every choice had finished."""
        if not self.complete:
            raise EngineError(f"the engine ended {self._unfinished} choices without a final event")

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def speculation(self) -> dict[str, Any]:
        """The ``metrics.speculative_decoding`` object over all choices.

        A rate or mean without a single step behind it is null, not a number.
        """
        steps = sum(stats.num_spec_steps for stats in self._speculation)
        drafted = sum(stats.num_draft_tokens for stats in self._speculation)
        accepted = sum(stats.num_accepted_draft_tokens for stats in self._speculation)
        columns = zip_longest(*(stats.acceptance_histogram for stats in self._speculation), fillvalue=0)
        histogram = [sum(column) for column in columns]
        return {
            "mean_acceptance_length": (accepted + steps) / steps if steps else None,
            "draft_acceptance_rate": accepted / drafted if drafted else None,
            "acceptance_histogram": histogram,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            # K, the longest block drafted: the histogram has K + 1 entries.
            "num_spec_tokens": max(len(histogram) - 1, 0),
        }
