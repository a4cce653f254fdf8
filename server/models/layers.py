"""The small modules of the decoder: linear layers in the form this device runs best, RMS norm, rotary embedding.

Weights arrive as plain tensors; modules are for inference only and never carry gradients. Shapes: rows are tokens of
the ragged batch, ``x`` is [rows, features].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.server.models.config import ModelConfig


def _onednn_packs(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        dtype is torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Module):
    """``x @ weight.T + bias``; weight [out, in].

    On CPUs with bf16 instructions the weight is repacked once into oneDNN's blocked layout: calling the plain
    operator repacks at every call, which made a SmolLM2 forward 24-96 ms instead of 13 ms (one row, two cores).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = _onednn_packs(weight.dtype, weight.device)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self.weight = weight
        self.bias = bias
        parts = (weight, bias)
        #: What one forward reads.
        self.num_bytes = sum(part.numel() * part.element_size() for part in parts if part is not None)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features] in the dtype of ``x``."""
        if x.dtype is torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self._eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)


class Rotary(nn.Module):
    """Rotate-half rotary embedding from the configuration's rotation speeds."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self._inv_freq = torch.tensor(config.rope_inv_freq, dtype=torch.float32, device=device)
        self._scale = config.rope_attention_scale

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each [rows, 1, head_dim]; the sign of rotate-half is folded into sin."""
        freqs = positions.to(torch.float32)[:, None, None] * self._inv_freq
        cos, sin = freqs.cos() * self._scale, freqs.sin() * self._scale
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply ``Rotary.angles`` to x [rows, heads, head_dim]."""
    cos, signed_sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def fuse(linears: Sequence[tuple[Tensor, Tensor | None]]) -> Linear:
    """One Linear for several that read the same input; outputs are concatenated in order."""
    weight = torch.cat([w for w, _ in linears])
    biases = [b for _, b in linears if b is not None]
    return Linear(weight, torch.cat(biases) if biases else None)
