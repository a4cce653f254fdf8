"""The runner over the native CPU executor: a ragged batch is one native call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.drafting import Drafted, Draw
from paceline.kernels.cpu.executor import Executor, Span
from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.cpu.verification import SampledBlock, verify_sampled
from paceline.server.decoding.verify import DraftBlock, Rule
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.runner import spread
from paceline.server.models.attention import SequenceRows


class CpuRunner:
    """``Runner`` whose logits are bitwise the same whatever shares the batch (per instruction set).

    Args:
        plan: the packed decoder.
        pool: the kernels' threads, shared by all members.
        buffer: the KV arena, uint8 [blocks, block_bytes].
        keep_states: in the blocks, for a draft that reads them.
    """

    def __init__(
        self,
        plan: DecoderPlan,
        pool: Pool,
        layout: MemberLayout,
        buffer: Tensor,
        kv_dtype: torch.dtype,
        *,
        keep_states: bool = False,
    ) -> None:
        self.layout = layout
        self.vocab_size = plan.vocab
        self.vocab_ids = plan.vocab_ids
        self.device = torch.device("cpu")
        self._pool = pool
        self._hidden = plan.hidden
        self._executor = Executor(
            plan, pool, buffer, kv_dtype=kv_dtype, block_tokens=layout.block_tokens, keep_states=keep_states
        )

    def forward(self, batch: Batch) -> Tensor:
        """See ``Runner.forward``."""
        logits = self._executor.forward(
            batch.tokens, _spans(batch.sequences), batch.wanted, features=batch.features
        )
        return spread(logits, self.vocab_ids, self.vocab_size)

    def forward_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``FeatureRunner.forward_states``."""
        states = torch.empty(len(batch.wanted), self._hidden)
        logits = self._executor.forward(
            batch.tokens, _spans(batch.sequences), batch.wanted, features=batch.features, states=states
        )
        return spread(logits, self.vocab_ids, self.vocab_size), states

    def read_states(self, spans: Sequence[SequenceRows]) -> Tensor:
        """See ``StateReader.read_states``."""
        return self._executor.read_states(_spans(spans))

    def argmax(self, logits: Tensor) -> list[int]:
        """See ``Runner.argmax``."""
        return self._pool.argmax(logits.contiguous()).tolist()

    def verify_sampled(
        self,
        scores: Tensor,
        first_rows: Sequence[int],
        blocks: Sequence[DraftBlock],
        uniforms: Tensor,
        rule: Rule,
    ) -> list[tuple[int, int]]:
        """See ``SampledVerifier.verify_sampled``."""
        sampled = [
            SampledBlock(row, block.token_ids, block.probs, block.columns)
            for row, block in zip(first_rows, blocks, strict=True)
        ]
        return verify_sampled(scores, sampled, uniforms, by_block=rule == "block", pool=self._pool)

    def draft(self, batch: Batch, draws: Sequence[Draw], columns: int) -> list[Drafted]:
        """See ``BlockDrafter.draft``."""
        return self._executor.draft(
            batch.tokens,
            _spans(batch.sequences),
            batch.wanted,
            draws,
            columns=columns,
            features=batch.features,
        )


def _spans(sequences: Sequence[SequenceRows]) -> list[Span]:
    return [(s.first_row, s.count, s.start, s.pages) for s in sequences]
