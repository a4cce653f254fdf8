"""The runner over the native CPU executor: a ragged batch is one native call."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.drafting import Drafted, Draw
from paceline.kernels.cpu.executor import Executor, Prepared, Span, forward_together
from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.cpu.verification import SampledBlock, verify_sampled
from paceline.server.decoding.verify import DraftBlock, Rule
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.engine.runner import KeptStates, spread
from paceline.server.models.attention import SequenceRows


class CpuRunner:
    """``Runner`` whose logits are bitwise the same whatever shares the batch (per instruction set).

    Args:
        plan: the packed decoder.
        pool: the kernels' threads, shared by all members.
        buffer: the KV arena, uint8 [blocks, block_bytes].
        keep_states: in the blocks, for a draft that reads them.

    Attributes:
        shape: see ``JointRunner``.
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
        sizes = (plan.hidden, plan.ffn, plan.heads, plan.kv_heads, plan.head_dim)
        self.shape: Hashable = (pool, len(plan.layers), *sizes)
        self._executor = Executor(
            plan, pool, buffer, kv_dtype=kv_dtype, block_tokens=layout.block_tokens, keep_states=keep_states
        )

    def forward(self, batch: Batch) -> Tensor:
        """See ``Runner.forward``."""
        return self.forward_together([self], [batch])[0]

    @staticmethod
    def forward_together(runners: Sequence["CpuRunner"], batches: Sequence[Batch]) -> list[Tensor]:
        """See ``JointRunner.forward_together``."""
        forwards = [runner.prepare(batch) for runner, batch in zip(runners, batches, strict=True)]
        forward_together(forwards)
        return [
            spread(forward.logits, runner.vocab_ids, runner.vocab_size)
            for runner, forward in zip(runners, forwards, strict=True)
        ]

    def prepare(self, batch: Batch) -> Prepared:
        """A forward that has yet to run."""
        return self._executor.prepare(
            batch.tokens, _spans(batch.sequences), batch.wanted, features=batch.features
        )

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

    def draft(
        self, batch: Batch, draws: Sequence[Draw], columns: int, kept: KeptStates | None = None
    ) -> list[Drafted]:
        """See ``BlockDrafter.draft``."""
        features, native = None, None
        if kept is not None and isinstance(kept.target, CpuRunner):
            native = kept.target._executor, [span.pages for span in kept.spans]
        elif kept is not None:
            features = kept.read()
        return self._executor.draft(
            batch.tokens,
            _spans(batch.sequences),
            batch.wanted,
            draws,
            columns=columns,
            features=features,
            kept=native,
        )


def _spans(sequences: Sequence[SequenceRows]) -> list[Span]:
    return [(s.first_row, s.count, s.start, s.pages) for s in sequences]
