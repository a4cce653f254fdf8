"""The public operations: contracts checked here, the implementation chosen by ``dispatch``.

Without a pool of native threads, or on another device, the reference computes; results then agree up to rounding. The
decoder's own path is ``cpu.executor``, where these operations are fused into one native call.
"""

import torch
from torch import Tensor

from paceline.kernels import dispatch
from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import PackedLinear


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


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype is not torch.float32:
        raise ValueError(f"expected fp32 [rows, columns], got {x.dtype} {list(x.shape)}")
