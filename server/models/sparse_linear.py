"""A linear layer whose weight is sparse, as torch modules run it: ``kernels.ops`` decides how."""

from torch import Tensor, nn

from paceline.kernels import ops
from paceline.kernels.formats import SparseTiles, SparseWeight, pack_tiles


class SparseLinear(nn.Module):
    """``x @ W.T + bias`` for a sparse W [out, in]; for inference only.

    Args:
        tiles: the weight as kernels read it, on the device of the bias.
        bias: [out], in the type of the activations or fp32.
    """

    def __init__(self, tiles: SparseTiles, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tiles.out_features, tiles.in_features
        self.tiles = tiles
        self.bias = bias

    @classmethod
    def from_weight(cls, weight: SparseWeight, bias: Tensor | None = None) -> "SparseLinear":
        """Repack a weight as artifacts hold it."""
        return cls(pack_tiles(weight), bias)

    @property
    def num_bytes(self) -> int:
        """Bytes that one forward reads."""
        bias = self.bias
        return self.tiles.num_bytes + (0 if bias is None else bias.numel() * bias.element_size())

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out] in the type of ``x``."""
        return ops.sparse_linear(x, self.tiles, self.bias)
