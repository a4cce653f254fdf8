"""The torch runner with tokens chosen and blocks verified by ``kernels.ops``: what ``PACELINE_KERNELS=triton`` runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels import ops
from paceline.server.decoding import noise
from paceline.server.decoding.rows import Row, is_seeded
from paceline.server.decoding.sampler import smallest_temperature
from paceline.server.decoding.verify import DraftBlock, Rule, spread_probs
from paceline.server.engine.runner import TorchRunner


class KernelRunner(TorchRunner):
    """``Runner``, ``SampledVerifier`` and ``TokenChooser`` whose operations are the dispatched kernels."""

    def argmax(self, logits: Tensor) -> list[int]:
        """See ``Runner.argmax``."""
        never = torch.zeros(len(logits), dtype=torch.bool)
        keys = torch.zeros(len(logits), dtype=torch.int64, device=self.device)
        ones = logits.new_ones(len(logits))
        tokens, _ = ops.combine([logits], ones[:, None], temperatures=ones, keys=keys, is_sampled=never)
        return tokens.tolist()

    def combine(self, members: Sequence[Tensor], weights: Tensor) -> Tensor:
        """See ``steering.Combiner.combine``."""
        rows = len(weights)
        return ops.combine(
            [member.contiguous() for member in members],
            weights,
            temperatures=weights.new_ones(rows),
            keys=torch.zeros(rows, dtype=torch.int64, device=self.device),
            is_sampled=torch.zeros(rows, dtype=torch.bool),
        )[1]

    def choose_tokens(self, scores: Tensor, rows: Sequence[Row], *, warped: bool) -> list[int]:
        """See ``TokenChooser.choose_tokens``."""
        seeded = [is_seeded(row) for row in rows]
        starts = [(row.sampling.seed or 0, row.choice, row.position) for row in rows]
        temperatures = [
            1.0 if warped or not drawn else smallest_temperature(row)
            for row, drawn in zip(rows, seeded, strict=True)
        ]
        tokens, _ = ops.combine(
            [scores],
            scores.new_ones(len(rows), 1),
            temperatures=scores.new_tensor(temperatures),
            keys=noise.keys(starts).to(self.device),
            is_sampled=torch.tensor(seeded),
        )
        return tokens.tolist()

    def verify_sampled(
        self,
        scores: Tensor,
        first_rows: Sequence[int],
        blocks: Sequence[DraftBlock],
        uniforms: Tensor,
        rule: Rule,
    ) -> list[tuple[int, int]]:
        """See ``SampledVerifier.verify_sampled``."""
        lengths = [len(block.token_ids) for block in blocks]
        depth = max(lengths)
        drafts = [[*block.token_ids, *[0] * (depth - n)] for block, n in zip(blocks, lengths, strict=True)]
        q = scores.new_zeros(len(blocks), depth, scores.shape[1])
        own = uniforms.new_zeros(len(blocks), depth + 1)
        at = 0
        for b, (block, n) in enumerate(zip(blocks, lengths, strict=True)):
            if block.probs is not None:
                spread_probs(block, q[b])
            elif n:
                q[b, torch.arange(n), list(block.token_ids)] = 1.0
            own[b, : n + 1] = uniforms[at : at + n + 1]
            at += n + 1
        accepted, tokens = ops.verify(
            scores,
            torch.tensor(first_rows, device=self.device),
            torch.tensor(drafts, dtype=torch.int64, device=self.device),
            torch.tensor(lengths, device=self.device),
            q,
            own,
            by_block=rule == "block",
        )
        return list(zip(accepted.tolist(), tokens.tolist(), strict=True))
