"""The public operations: contracts checked here, the implementation chosen by ``dispatch``.

Without a pool of native threads, or on another device, the reference computes; results then agree up to rounding. The
decoder's own path is ``cpu.executor``, where these operations are fused into one native call.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paceline.kernels import dispatch
from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import PackedLinear, SparseTiles

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def linear(x: Tensor, layer: PackedLinear, pool: Pool | None = None) -> Tensor:
    """y = x W^T + bias; int8 layers quantize x in groups of 64 inputs.

    Args:
        x: fp32 [rows, in], on the device of the layer.
        pool: threads and instruction set of the native kernels; None takes the reference.

    Returns:
        fp32 [rows, out].

    Raises:
        ValueError: shape, type or device of ``x`` does not fit the layer.
        NoKernelError: no implementation for this format and device.
        MemoryError: no memory for the prepared activations.
    """
    _check_matrix(x)
    if x.shape[1] != layer.in_features:
        raise ValueError(f"x has {x.shape[1]} columns, the layer {layer.in_features} inputs")
    if x.device != layer.data.device:
        raise ValueError(f"x is on {x.device}, the layer on {layer.data.device}")
    kernel = dispatch.kernel("linear", layer.format, x.device.type, has_pool=pool is not None)
    return kernel.run(x, layer, pool)  # type: ignore[no-any-return]


def argmax(x: Tensor, pool: Pool | None = None) -> Tensor:
    """Index of each row's greatest value, the lowest among equals; rows must hold no NaN.

    Args:
        x: fp32 [rows, n] with n > 0.
        pool: as for ``linear``.

    Returns:
        int32 [rows].

    Raises:
        ValueError: not a matrix of fp32, or no columns.
    """
    _check_matrix(x)
    if not x.shape[1]:
        raise ValueError("argmax of rows without columns")
    kernel = dispatch.kernel("argmax", "fp32", x.device.type, has_pool=pool is not None)
    return kernel.run(x.contiguous(), pool)  # type: ignore[no-any-return]


def sparse_linear(x: Tensor, tiles: SparseTiles, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for a sparse W; int8 values times their row's scale, x is not quantized.

    Args:
        x: fp32, fp16 or bf16 [rows, in], on the device of the tiles.
        bias: of the same type or fp32, [out].

    Returns:
        [rows, out] in the type of ``x``; sums are made in fp32 or wider.

    Raises:
        ValueError: shape, type or device of ``x`` or ``bias`` does not fit.
        UnknownKernelsError, NoKernelError: see ``dispatch.kernel``.
    """
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"expected fp32, fp16 or bf16 [rows, in], got {_short(x)}")
    if x.shape[1] != tiles.in_features:
        raise ValueError(f"x has {x.shape[1]} columns, the weight {tiles.in_features} inputs")
    if bias is not None and (
        bias.shape != (tiles.out_features,) or bias.dtype not in (x.dtype, torch.float32)
    ):
        raise ValueError(f"the bias of {tiles.out_features} outputs cannot be {_short(bias)}")
    for part in (x, bias):
        if part is not None and part.device != tiles.device:
            raise ValueError(f"x or bias is on {part.device}, the weight on {tiles.device}")
    kernel = dispatch.kernel("sparse_linear", tiles.value_dtype, x.device.type, has_pool=False)
    return kernel.run(x, tiles, bias)  # type: ignore[no-any-return]


def combine(
    members: Sequence[Tensor],
    weights: Tensor,
    *,
    temperatures: Tensor,
    keys: Tensor,
    is_sampled: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits = sum_i w_i s_i per row, and each row's token: the argmax, or with seeded Gumbel noise.

    A sampled row's token is the argmax of (logits - their maximum) / temperature + noise(key), a temperature of 1
    leaving the logits as they are. A member of weight 0 is left out, also where its logit is minus infinity. Ties keep
    the lower id. Rows hold no NaN and some finite logit; minus infinity only in members whose weight is not negative.

    Args:
        members: fp32 [rows, V] each, at least one.
        weights: fp32 [rows, members].
        temperatures: fp32 [rows], positive; not read for rows that are not sampled.
        keys: int64 [rows], where each row's noise starts (``kernels.noise``); not read for rows that are not sampled.
        is_sampled: bool [rows], on a CPU or the device of all others.

    Returns:
        Tokens int64 [rows], and the combined logits, fp32 [rows, V].

    Raises:
        ValueError: shapes or types do not fit.
    """
    if not members:
        raise ValueError("there must be a member")
    rows, width = members[0].shape
    wanted = {
        **{f"member {i}": (own, (rows, width), torch.float32) for i, own in enumerate(members)},
        "weights": (weights, (rows, len(members)), torch.float32),
        "temperatures": (temperatures, (rows,), torch.float32),
        "keys": (keys, (rows,), torch.int64),
        "is_sampled": (is_sampled, (rows,), torch.bool),
    }
    _check_all(wanted)
    kernel = dispatch.kernel("combine", "fp32", members[0].device.type, has_pool=False)
    return kernel.run(members, weights, temperatures, keys, is_sampled)  # type: ignore[no-any-return]


def verify(
    scores: Tensor,
    first_rows: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    q: Tensor,
    uniforms: Tensor,
    *,
    by_block: bool,
) -> tuple[Tensor, Tensor]:
    """Verify draft blocks by block verification (2403.10444), or token by token (2211.17192).

    Args:
        scores: fp32 [N, V]; softmax of a row is the target's distribution p.
        first_rows: int64 [B]; row first + j is the target's position after j draft tokens of the block.
        drafts: int64 [B, K], any valid id past a block's length.
        lengths: int64 [B], each 0..K; a block of length 0 is a plain draw.
        q: fp32 [B, K, V], what the draft tokens were drawn from; not read past a block's length.
        uniforms: float64 [B, K + 1] in [0, 1): one per draft token, at column ``length`` the one for the token after.

    Returns:
        Accepted draft tokens, int64 [B], and the recovered or bonus token, int64 [B].

    Raises:
        ValueError: shapes or types do not fit.
    """
    if scores.dim() != 2 or drafts.dim() != 2:
        raise ValueError(f"expected scores [N, V] and drafts [B, K], got {_short(scores)}, {_short(drafts)}")
    (blocks, depth), width = drafts.shape, scores.shape[1]
    wanted = {
        "scores": (scores, tuple(scores.shape), torch.float32),
        "first_rows": (first_rows, (blocks,), torch.int64),
        "drafts": (drafts, (blocks, depth), torch.int64),
        "lengths": (lengths, (blocks,), torch.int64),
        "q": (q, (blocks, depth, width), torch.float32),
        "uniforms": (uniforms, (blocks, depth + 1), torch.float64),
    }
    _check_all(wanted)
    kernel = dispatch.kernel("verify", "fp32", scores.device.type, has_pool=False)
    return kernel.run(scores, first_rows, drafts, lengths, q, uniforms, by_block=by_block)  # type: ignore[no-any-return]


def _check_all(wanted: Mapping[str, tuple[Tensor, tuple[int, ...], torch.dtype]]) -> None:
    """Every tensor has its shape and type."""
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} {list(shape)}, got {_short(tensor)}"
            )


def _short(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype is not torch.float32:
        raise ValueError(f"expected fp32 [rows, columns], got {x.dtype} {list(x.shape)}")
