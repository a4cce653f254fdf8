"""Random sparse weights for benches: decoders with sparse blocks, and single linears in the shapes of real models."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.memory import compact
from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import LANES, Format, PackedLinear

#: Rows that are really drawn; wider layers repeat them, so that packing takes seconds.
_DRAWN_ROWS = 256
#: (out, in) of one block's linears: qkv, output, gate and up, down.
LINEARS = {
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "qwen2.5-1.5b": ((2048, 1536), (1536, 1536), (17_920, 1536), (1536, 8960)),
    "llama-7b": ((12_288, 4096), (4096, 4096), (22_016, 4096), (4096, 11_008)),
    "llama-70b": ((10_240, 8192), (8192, 8192), (57_344, 8192), (8192, 28_672)),
}


def prune(plan: DecoderPlan, sparsity: float) -> DecoderPlan:
    """The plan with a random share of every block's weights left out; all blocks get the first one's weights."""
    first = plan.layers[0]
    sparse = replace(
        first,
        qkv=_pruned(first.qkv, sparsity),
        output=_pruned(first.output, sparsity),
        gate_up=_pruned(first.gate_up, sparsity),
        down=_pruned(first.down, sparsity),
    )
    return compact(replace(plan, layers=(sparse,) * len(plan.layers)))


def blocks_of(plan: DecoderPlan) -> list[PackedLinear]:
    """The linears of all blocks, without the head."""

    def of(layer: LayerPlan) -> list[PackedLinear]:
        return [layer.qkv, layer.output, layer.gate_up, layer.down]

    return [linear for layer in plan.layers for linear in of(layer)]


def random_linear(out: int, width: int, sparsity: float, format: Format, pool: Pool) -> PackedLinear:
    """A linear of random weights; dense where ``sparsity`` is 0."""
    rows = min(out, _DRAWN_ROWS)
    weight = torch.randn(rows, width)
    kept = torch.rand(rows, width) >= sparsity
    drawn = pack_sparse(weight * kept, kept, format) if sparsity else pool.pack(weight, format)
    return _repeated(drawn, out)


def weight_bytes(linears: Sequence[PackedLinear]) -> int:
    """Bytes of weights that running the linears once reads."""
    return sum(_tile_bytes(linear) for linear in linears)


def _tile_bytes(linear: PackedLinear) -> int:
    return len(linear.data) if linear.tile_starts is None else int(linear.tile_starts[-1])


def _pruned(linear: PackedLinear, sparsity: float) -> PackedLinear:
    weight = linear.unpack()
    kept = torch.rand(weight.shape) >= sparsity
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
