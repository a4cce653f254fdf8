"""The runner over the native CPU executor: a ragged batch is one native call."""

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import DecoderPlan, Executor
from paceline.kernels.cpu.library import Pool
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout


class CpuRunner:
    """``Runner`` whose logits are bitwise the same whatever shares the batch (per instruction set).

    Args:
        plan: the packed decoder.
        pool: the kernels' threads, shared by all members.
        buffer: the KV arena, uint8 [blocks, block_bytes].
    """

    def __init__(
        self, plan: DecoderPlan, pool: Pool, layout: MemberLayout, buffer: Tensor, kv_dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.vocab_size = plan.vocab
        self.device = torch.device("cpu")
        self._executor = Executor(plan, pool, buffer, kv_dtype=kv_dtype, block_tokens=layout.block_tokens)

    def forward(self, batch: Batch) -> Tensor:
        """See ``Runner.forward``."""
        spans = [(s.first_row, s.count, s.start, s.pages) for s in batch.sequences]
        return self._executor.forward(batch.tokens, spans, batch.wanted)
