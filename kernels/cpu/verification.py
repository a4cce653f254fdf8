"""Verification of unseeded sampled choices in one native call: what stays of draft blocks, and the token after."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.cpu.library import I32, I64, PTR, Pool, check, library


@dataclass(frozen=True, slots=True)
class SampledBlock:
    """A draft block to verify, or a plain draw if it has no tokens.

    Attributes:
        first_row: of the scores; row first_row + j is the target's position after j draft tokens.
        token_ids: K draft tokens.
        q: fp32 [K, n] the distributions they were drawn from; None is one-hot.
        columns: token id of each column of ``q``, ascending, int64 [n]; None is the first n ids.
    """

    first_row: int
    token_ids: Sequence[int] = ()
    q: Tensor | None = None
    columns: Tensor | None = None


class _Block(ctypes.Structure):
    _fields_ = (
        ("first_row", I32),
        ("length", I32),
        ("width", I64),
        *((name, PTR) for name in ("tokens", "q", "columns", "uniforms")),
        ("accepted", I32),
        ("token", I32),
    )


def verify_sampled(
    scores: Tensor, blocks: Sequence[SampledBlock], uniforms: Tensor, *, by_block: bool, pool: Pool
) -> list[tuple[int, int]]:
    """Verify blocks by block verification, or token by token.

    Args:
        scores: fp32 [rows, V]; p = softmax of a row.
        uniforms: float64 [sum of K + 1] in [0, 1): of each block, one per draft token and one for the token after.

    Returns:
        (accepted draft tokens, the token after them) per block.
    """
    scores, uniforms = scores.contiguous(), uniforms.contiguous()
    assert scores.dtype is torch.float32
    assert uniforms.dtype is torch.float64
    assert len(uniforms) == sum(len(block.token_ids) + 1 for block in blocks)
    structs = (_Block * len(blocks))()
    kept: list[object] = []  # what the structs point into
    at = uniforms.data_ptr()
    for block, struct in zip(blocks, structs, strict=True):
        tokens = (I32 * len(block.token_ids))(*block.token_ids)
        kept.append(tokens)
        struct.first_row, struct.length = block.first_row, len(block.token_ids)
        struct.tokens, struct.uniforms = ctypes.addressof(tokens), at
        at += (struct.length + 1) * uniforms.itemsize
        if block.q is not None and struct.length:
            q = block.q.contiguous()
            assert q.dtype is torch.float32
            assert len(q) == struct.length, f"draft probs {list(q.shape)}"
            kept.append(q)
            struct.width, struct.q = q.shape[1], q.data_ptr()
            struct.columns = None if block.columns is None else block.columns.data_ptr()
    status = library().pl_verify(
        scores.data_ptr(), scores.shape[1], structs, len(structs), by_block, pool.handle, pool.isa_code
    )
    check(status)
    return [(struct.accepted, struct.token) for struct in structs]
