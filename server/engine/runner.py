"""Runs one ragged batch of one member; the seam behind which executors differ (torch here).

A runner owns weights and KV views, and nothing about requests.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.models.attention import AttentionPlan
from paceline.server.models.llama import Decoder, KvViews, RaggedInput


class Runner(Protocol):
    """What the engine needs of an executor.

    A model of a restricted vocabulary has logits of minus infinity for all other ids.
    """

    layout: MemberLayout
    vocab_size: int
    device: torch.device

    def forward(self, batch: Batch) -> Tensor:
        """Write the batch's K and V and return fp32 logits [len(batch.wanted), vocab_size]."""
        ...

    def argmax(self, logits: Tensor) -> list[int]:
        """Index of each row's greatest value, the lowest among equals: fp32 [rows, vocab]."""
        ...


@runtime_checkable
class GreedyDrafter(Protocol):
    """A runner that drafts whole greedy blocks in one call."""

    def draft_greedy(self, batch: Batch, drafting: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Run the batch, then one greedy row per drafting sequence and forward.

        Args:
            batch: its wanted rows are the last ones of the drafting sequences.
            drafting: (index of the sequence in the batch, tokens to draft >= 1), in the order of ``batch.wanted``;
                blocks have room for all but the last draft token.

        Returns:
            Draft tokens per drafting sequence.
        """
        ...


class TorchRunner:
    """Torch modules over arena views: the oracle on CPU, the product path on CUDA."""

    def __init__(self, decoder: Decoder, layout: MemberLayout, kv: KvViews) -> None:
        self.layout = layout
        self.vocab_size = decoder.config.vocab_size
        self._vocab_ids = decoder.vocab_ids
        self.device = decoder.embedding.device
        self._decoder = decoder
        self._kv = kv

    def forward(self, batch: Batch) -> Tensor:
        """See ``Runner.forward``."""
        plan = AttentionPlan(batch.sequences, self.layout.block_tokens, self.device)
        tokens = torch.tensor(batch.tokens, dtype=torch.long, device=self.device)
        wanted = torch.tensor(batch.wanted, dtype=torch.long, device=self.device)
        logits: Tensor = self._decoder(RaggedInput(tokens, plan, wanted), self._kv)
        return spread(logits, self._vocab_ids, self.vocab_size)

    def argmax(self, logits: Tensor) -> list[int]:
        """See ``Runner.argmax``."""
        return logits.argmax(dim=-1).tolist()  # torch promises the first of equal maxima


def spread(logits: Tensor, vocab_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Logits of a restricted vocabulary in their places among all ids.

    Args:
        logits: fp32 [rows, k].
        vocab_ids: token id of each column, int32 [k] on the same device; None returns ``logits`` as they are.

    Returns:
        fp32 [rows, vocab_size], minus infinity where there is no logit.
    """
    if vocab_ids is None:
        return logits
    return logits.new_full((len(logits), vocab_size), float("-inf")).index_copy_(1, vocab_ids.long(), logits)
