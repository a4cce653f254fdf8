"""Slow exact torch versions of the kernels: the oracle that every implementation is tested against."""

import torch
from torch import Tensor

from paceline.kernels.formats import GROUP, PackedLinear, SparseTiles, padded


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in groups of 64 inputs: x fp32 [rows, in] -> values int32 [rows, groups, 64], scales fp32 [rows, groups].

    Symmetric, one scale per row and group, values in [-127, 127], ties to even.
    """
    rows, width = x.shape
    whole = x.new_zeros(rows, padded(width, GROUP))
    whole[:, :width] = x
    groups = whole.view(rows, -1, GROUP)
    top = groups.abs().amax(-1)
    inverse = torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
    return torch.round(groups * inverse[..., None]).to(torch.int32), top / 127.0


def linear(x: Tensor, layer: PackedLinear) -> Tensor:
    """y = x W^T + bias, fp32 [rows, in] -> [rows, out]; int8 with exact integer group sums."""
    if layer.format != "int8":
        y = (x.double() @ layer.unpack().double().T).float()
    else:
        values, scales = quantize_activations(x)
        weights = _int8_groups(layer)
        sums = torch.einsum("rgk,ogk->rgo", values.double(), weights.double())
        y = (sums * scales.double()[..., None]).sum(1).float()
        assert layer.scale is not None
        y = y * layer.scale[: layer.out_features]
    if layer.bias is not None:
        y = y + layer.bias[: layer.out_features]
    return y


def sparse_linear(x: Tensor, tiles: SparseTiles, bias: Tensor | None) -> Tensor:
    """See ``ops.sparse_linear``; products and sums in float64."""
    weight = tiles.stored().double()
    y = x.double() @ weight.T
    if tiles.scale is not None:
        y = y * tiles.scale.double()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


def argmax(x: Tensor) -> Tensor:
    """Index of each row's greatest value, the lowest among equals: fp32 [rows, n] -> int32 [rows]."""
    return (x == x.amax(-1, keepdim=True)).int().argmax(-1).to(torch.int32)


def _int8_groups(layer: PackedLinear) -> Tensor:
    """Integer weights [out, groups, 64]."""
    assert layer.scale is not None
    unit = PackedLinear(
        "int8", layer.out_features, layer.in_padded, layer.data, torch.ones_like(layer.scale), None
    )
    return unit.unpack().view(layer.out_features, -1, GROUP)
