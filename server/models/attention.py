"""Paged attention in torch: the oracle of the native kernels, and the path on CUDA.

K and V of all rows go to the cache first, in cache dtype, and every row reads them back from it. Sequences with few
query rows (decode and verify blocks) are padded into one batched call; long prefill chunks run one by one.
Shapes: q [rows, heads, head_dim]; k, v [rows, kv_heads, head_dim]; a layer's cache view is
[pages, page_tokens, kv_heads, head_dim].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Sequences with at most this many query rows share one padded call.
MAX_PADDED_QUERY_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Where one sequence's rows lie: batch rows [first_row, first_row + count), positions from ``start``."""

    first_row: int
    count: int
    start: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences attended in one call; ``rows`` [B, T] batch rows (padding repeats row 0 of the sequence)."""

    rows: Tensor
    pages: Tensor  # [B, P]
    positions: Tensor  # [B, T] absolute position of each query
    real: Tensor  # [B * T] flat indices of the queries that are not padding
    context: int  # positions of the cache that are read, from 0


class AttentionPlan:
    """The index tensors of one ragged batch, built once and used by every layer."""

    def __init__(self, sequences: Sequence[SequenceRows], page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        positions = [s.start + i for s in sequences for i in range(s.count)]
        pages = [s.pages[(s.start + i) // page_tokens] for s in sequences for i in range(s.count)]
        self.positions = torch.tensor(positions, dtype=torch.long, device=device)
        self._write_pages = torch.tensor(pages, dtype=torch.long, device=device)
        self._write_offsets = self.positions % page_tokens
        short = [s for s in sequences if s.count <= MAX_PADDED_QUERY_TOKENS]
        long = [[s] for s in sequences if s.count > MAX_PADDED_QUERY_TOKENS]
        self._groups = [self._group(g, device) for g in [short, *long] if g]
        self._masks: dict[tuple[int, int | None, int], Tensor] = {}

    def _group(self, group: Sequence[SequenceRows], device: torch.device) -> _Group:
        width = max(s.count for s in group)
        context = max(s.start + s.count for s in group)
        pages = -(-context // self._page_tokens)
        table = [(list(s.pages[:pages]) + [0] * pages)[:pages] for s in group]
        rows = [[s.first_row + (i if i < s.count else 0) for i in range(width)] for s in group]
        positions = [[s.start + (i if i < s.count else 0) for i in range(width)] for s in group]
        real = [b * width + i for b, s in enumerate(group) for i in range(s.count)]
        return _Group(
            torch.tensor(rows, device=device),
            torch.tensor(table, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(real, device=device),
            context,
        )

    def write(self, pages: Tensor, rows: Tensor) -> None:
        """Put one entry per row, [rows, ...], into its place in ``pages`` [pages, page_tokens, ...]."""
        pages[self._write_pages, self._write_offsets] = rows.to(pages.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None
    ) -> Tensor:
        """Write k and v to the cache, then attend; returns [rows, heads * head_dim]."""
        self.write(k_cache, k)
        self.write(v_cache, v)
        out = torch.empty_like(q)
        for index, group in enumerate(self._groups):
            repeats = q.shape[1] // k_cache.shape[2]
            mask = self._mask(index, group, window, repeats)
            out[group.rows.flatten()[group.real]] = _attend_group(q, k_cache, v_cache, group, mask)
        return out.flatten(1)

    def _mask(self, index: int, group: _Group, window: int | None, repeats: int) -> Tensor:
        """Boolean [B, 1, repeats * T, context], query heads of one KV head stacked along the query axis."""
        key = (index, window, repeats)
        if key not in self._masks:
            keys = torch.arange(group.context, device=group.positions.device)
            distance = group.positions[:, :, None] - keys
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            self._masks[key] = seen.repeat(1, repeats, 1)[:, None]
        return self._masks[key]


def _attend_group(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Group, mask: Tensor) -> Tensor:
    """Grouped-query attention of one padded group; returns the real rows, [rows, heads, head_dim]."""
    batch, width = group.rows.shape
    kv_heads, head_dim = k_cache.shape[2:]
    k = k_cache[group.pages].flatten(1, 2)[:, : group.context].transpose(1, 2).to(q.dtype)
    v = v_cache[group.pages].flatten(1, 2)[:, : group.context].transpose(1, 2).to(q.dtype)
    queries = q[group.rows].view(batch, width, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(batch, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    out = out.view(batch, kv_heads, -1, width, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch * width, -1, head_dim)[group.real]
