"""Random sparse weights for benches: decoders with sparse blocks, and single linears in the shapes of real models."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.memory import compact
from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import LANES, Format, PackedLinear, Pattern

#: Rows that are really drawn; wider layers repeat them, so that packing takes seconds.
_DRAWN_ROWS = 256
#: (out, in) of one block's linears: qkv, output, gate and up, down.
LINEARS = {
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "qwen2.5-1.5b": ((2048, 1536), (1536, 1536), (17_920, 1536), (1536, 8960)),
    "llama-7b": ((12_288, 4096), (4096, 4096), (22_016, 4096), (4096, 11_008)),
    "llama-70b": ((10_240, 8192), (8192, 8192), (57_344, 8192), (8192, 28_672)),
}


class Pruned(NamedTuple):
    """How much is left out, and where: the density of an n:m pattern is 1 - ``sparsity``."""

    sparsity: float
    pattern: Pattern = Pattern()

    def __str__(self) -> str:
        return f"{self.sparsity:.0%}{f' {self.pattern}' if self.pattern.structured else ''}"

    def draw(self, out: int, width: int) -> Tensor:
        """What a random weight keeps, bool [out, width]."""
        n, m = self.pattern.n, self.pattern.m
        if not m:
            return torch.rand(out, width) >= self.sparsity
        kept = torch.rand(out, -(-width // m), m).argsort(-1) < n
        return kept.view(out, -1)[:, :width]


def prune(plan: DecoderPlan, pruned: Pruned) -> DecoderPlan:
    """The plan with random weights of every block left out; all blocks get the first one's weights."""
    first, cut = plan.layers[0], partial(_cut, pruned=pruned)
    sparse = replace(
        first,
        qkv=cut(first.qkv),
        output=cut(first.output),
        gate_up=cut(first.gate_up),
        down=cut(first.down),
    )
    return compact(replace(plan, layers=(sparse,) * len(plan.layers)))


def blocks_of(plan: DecoderPlan) -> list[PackedLinear]:
    """The linears of all blocks, without the head."""

    def of(layer: LayerPlan) -> list[PackedLinear]:
        return [layer.qkv, layer.output, layer.gate_up, layer.down]

    return [linear for layer in plan.layers for linear in of(layer)]


def random_linear(out: int, width: int, pruned: Pruned, format: Format, pool: Pool) -> PackedLinear:
    """A linear of random weights; dense where nothing is pruned."""
    rows = min(out, _DRAWN_ROWS)
    weight = torch.randn(rows, width)
    kept = pruned.draw(rows, width)
    drawn = pack_sparse(weight * kept, kept, format) if pruned.sparsity else pool.pack(weight, format)
    return _repeated(drawn, out)


def weight_bytes(linears: Sequence[PackedLinear]) -> int:
    """Bytes of weights that running the linears once reads."""
    return sum(_tile_bytes(linear) for linear in linears)


def _tile_bytes(linear: PackedLinear) -> int:
    return len(linear.data) if linear.tile_starts is None else int(linear.tile_starts[-1])


def _cut(linear: PackedLinear, pruned: Pruned) -> PackedLinear:
    weight = linear.unpack()
    kept = pruned.draw(*weight.shape)
    bias = None if linear.bias is None else linear.bias[: linear.out_features]
    return pack_sparse(weight * kept, kept, linear.format, bias=bias)


def _repeated(drawn: PackedLinear, out: int) -> PackedLinear:
    """The drawn rows again and again; the last time, as many of their tiles as are needed."""
    tiles, have = -(-out // LANES), -(-drawn.out_features // LANES)
    times, starts = -(-tiles // have), drawn.tile_starts
    scale = None if drawn.scale is None else drawn.scale.repeat(times)[: tiles * LANES]
    if starts is None:
        size = len(drawn.data) // have
        return replace(drawn, out_features=out, data=drawn.data.repeat(times)[: tiles * size], scale=scale)
    end = int(starts[-1])
    every = torch.cat([starts[:-1] + i * end for i in range(times)] + [torch.tensor([times * end])])
    body: Tensor = drawn.data[:end].repeat(times)
    data = torch.cat([body, drawn.data[end:]])
    return replace(
        drawn, out_features=out, data=data, scale=scale, tile_starts=every[: tiles + 1].contiguous()
    )
