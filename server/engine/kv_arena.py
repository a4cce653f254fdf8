"""The memory behind the KV blocks: one buffer of equal blocks that every model views in its own shape.

Inside a block a member stores, per layer, K then V, each [block_tokens, kv_heads, head_dim]; a target whose draft
reads states keeps them behind, [block_tokens, hidden]. The last bytes of a block may stay unused when a member's
tokens do not fill it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MemberShape:
    """A member as the arena sees it.

    Attributes:
        key: that of ``MemberLayout``; it must say whether states are kept.
        keeps_states: whether blocks hold the state of every token beside K and V.
    """

    key: str
    config: ModelConfig
    dtype: torch.dtype
    keeps_states: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of all layers, and of the state, for one token."""
        states = self.config.hidden_size if self.keeps_states else 0
        return (self._kv_values + states) * self.dtype.itemsize

    @property
    def _kv_values(self) -> int:
        return self.config.num_layers * 2 * self.config.num_kv_heads * self.config.head_dim


class KvArena:
    """Allocates the buffer for a set of members and hands out layouts and views.

    Attributes:
        buffer: uint8 [num_blocks, block_bytes]; a member that has a layout of its own inside blocks uses this.

    Args:
        members: everything that will store K and V here.
        block_size: tokens per block of the widest member; the others get the largest multiple that fits.
        total_bytes: the KV budget; rounded down to whole blocks, at least one.
    """

    def __init__(
        self, members: list[MemberShape], *, block_size: int, total_bytes: int, device: torch.device
    ) -> None:
        widest = max(m.bytes_per_token for m in members)
        self.block_bytes = block_size * widest
        self.num_blocks = max(1, total_bytes // self.block_bytes)
        self._block_size = block_size
        self.buffer = torch.zeros(self.num_blocks, self.block_bytes, dtype=torch.uint8, device=device)

    def layout(self, member: MemberShape) -> MemberLayout:
        """How many tokens of this member fit into a block: a multiple of ``block_size``."""
        fitting = self.block_bytes // member.bytes_per_token
        return MemberLayout(member.key, fitting // self._block_size * self._block_size)

    def views(self, member: MemberShape) -> list[tuple[Tensor, Tensor]]:
        """Per layer K and V, each [num_blocks, block_tokens, kv_heads, head_dim], writable."""
        shape = (self.layout(member).block_tokens, member.config.num_kv_heads, member.config.head_dim)
        size = shape[0] * shape[1] * shape[2]
        typed = self.buffer.view(member.dtype)
        parts = [
            typed[:, i * size : (i + 1) * size].view(self.num_blocks, *shape)
            for i in range(2 * member.config.num_layers)
        ]
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def states(self, member: MemberShape) -> Tensor | None:
        """Where the member's states are kept, [num_blocks, block_tokens, hidden], writable; None if they are not."""
        if not member.keeps_states:
            return None
        config, tokens = member.config, self.layout(member).block_tokens
        start = 2 * config.num_layers * tokens * config.num_kv_heads * config.head_dim
        typed = self.buffer.view(member.dtype)[:, start : start + tokens * config.hidden_size]
        return typed.view(self.num_blocks, tokens, config.hidden_size)
