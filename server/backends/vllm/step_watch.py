"""vLLM's statistics of one step as the engine's observer wants them, and as the queue's state.

The objects are those of ``vllm.v1.metrics.stats``, read by attribute only. Runs on the event loop, where vLLM's output
handler calls it.
"""

from collections.abc import Sequence
from typing import Any

from paceline.server.engine.interface import EngineObserver, StepStats


class StepWatch:
    """A stat logger of vLLM's, one for all engine cores.

    Attributes:
        waiting: requests in vLLM's queues, as of the last step of each core.
        kv_usage: share of the KV blocks in use, 0 to 1; the mean over the cores.
    """

    def __init__(self, model: str, observer: EngineObserver) -> None:
        self._model, self._observer = model, observer
        self._waiting: dict[int, int] = {}
        self._usage: dict[int, float] = {}

    @property
    def waiting(self) -> int:
        """See the class."""
        return sum(self._waiting.values())

    @property
    def kv_usage(self) -> float:
        """See the class."""
        return sum(self._usage.values()) / max(1, len(self._usage))

    def record(self, scheduler: Any | None, iteration: Any | None, core: int) -> None:
        """Count one step of one engine core; either part may be missing."""
        if scheduler is not None:
            self._waiting[core] = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._usage[core] = scheduler.kv_cache_usage
        self._observer.on_step(_step(self._model, scheduler, iteration))


def _step(model: str, scheduler: Any | None, iteration: Any | None) -> StepStats:
    blocks = None if scheduler is None else scheduler.spec_decoding_stats
    accepted = (
        () if blocks is None else accepted_per_block(blocks.num_drafts, blocks.num_accepted_tokens_per_pos)
    )
    cache = None if scheduler is None else scheduler.prefix_cache_stats
    return StepStats(
        model=model,
        phase_seconds={},  # vLLM does not tell them apart
        prompt_tokens=0 if iteration is None else iteration.prompt_token_stats.computed,
        generated_tokens=0 if iteration is None else iteration.num_generation_tokens,
        drafted_per_block=() if blocks is None else _spread(blocks.num_draft_tokens, blocks.num_drafts),
        accepted_per_block=accepted,
        prefix_queries=0 if cache is None else cache.queries,
        prefix_hits=0 if cache is None else cache.hits,
        preemptions=0 if iteration is None else iteration.num_preempted_reqs,
    )


def accepted_per_block(num_blocks: int, reached: Sequence[int]) -> list[int]:
    """How many tokens each of some blocks accepted, longest first.

    Args:
        reached: per position in a block, how many of the blocks accepted it; never rising.
    """
    return [sum(count > block for count in reached) for block in range(num_blocks)]


def _spread(total: int, parts: int) -> list[int]:
    """``total`` in equal parts: vLLM tells the sum only, and so do the metrics."""
    if not parts:
        return []
    each, more = divmod(total, parts)
    return [each + (part < more) for part in range(parts)]
