"""Sparse linears as torch modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.kernels.formats import SparseWeight


class SparseLinear(nn.Module):
    """``x @ weight.T + bias`` for a sparse weight, which is expanded when it is made."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.scale = weight, bias, scale
        parts = (weight, bias, scale)
        #: What one forward reads.
        self.num_bytes = sum(part.numel() * part.element_size() for part in parts if part is not None)

    @classmethod
    def from_weight(cls, weight: SparseWeight, bias: Tensor | None = None) -> "SparseLinear":
        """Expand; int8 is dequantized when it is used, to the type of its input."""
        return cls(weight.stored(), bias, weight.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, (self.weight.to(torch.float32) * self.scale[:, None]).to(x.dtype), self.bias)
