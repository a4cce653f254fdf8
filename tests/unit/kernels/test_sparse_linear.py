"""Sparse tiles: a sparse weight gives the bits of the same weight dense, on every instruction set and in any batch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from native_kernels import pool
from torch import Tensor

from paceline.kernels import ops
from paceline.kernels.bench.shapes import Shape, executor, random_plan
from paceline.kernels.cpu.int8 import pack_rows, quantize_rows
from paceline.kernels.cpu.library import usable_isas
from paceline.kernels.cpu.plan import LayerPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import FORMATS, Format, PackedLinear

#: (out, in): around the tile of 16 rows and the groups of 16, 32 and 64 inputs.
SHAPES = [(1, 1), (5, 3), (16, 63), (17, 65), (33, 130), (64, 64), (150, 257)]
ROWS = [1, 2, 4, 5, 8, 9, 17]
DENSITIES = [0.0, 0.05, 0.5, 0.97, 1.0]


def pruned(out: int, width: int, density: float) -> tuple[Tensor, Tensor]:
    """A weight and what of it is kept; some kept values are zeros, some rows have nothing."""
    generator = torch.Generator().manual_seed(1000 * out + width)
    weight = torch.randn(out, width, generator=generator) * torch.logspace(-2, 2, out)[:, None]
    kept = torch.rand(out, width, generator=generator) < density
    kept[out // 2] = False
    return torch.where(kept, weight, 0.0), kept


def both(
    format: Format, weight: Tensor, kept: Tensor, bias: Tensor | None
) -> tuple[PackedLinear, PackedLinear]:
    """The weight sparse and dense."""
    return pack_sparse(weight, kept, format, bias=bias), pool("portable").pack(weight, format, bias)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", DENSITIES)
def test_a_sparse_weight_gives_the_bits_of_a_dense_one(isa, format, density):
    for out, width in SHAPES:
        weight, kept = pruned(out, width, density)
        sparse, dense = both(format, weight, kept, torch.linspace(-1, 1, out))
        for rows in ROWS:
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
            expected = pool(isa).linear(x, dense)
            assert torch.equal(pool(isa).linear(x, sparse), expected)
            assert torch.allclose(
                ops.linear(x, sparse), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", DENSITIES)
def test_unpacking_gives_what_was_packed(format, density):
    for out, width in SHAPES:
        weight, kept = pruned(out, width, density)
        sparse, dense = both(format, weight, kept, None)
        assert torch.equal(sparse.unpack(), dense.unpack())


def n_of_m(out: int, width: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """A weight that keeps ``n`` of every ``m`` inputs, and what is kept; one row keeps nothing."""
    weight, _ = pruned(out, width, 1.0)
    order = torch.rand(out, -(-width // m), m, generator=torch.Generator().manual_seed(n)).argsort(-1)
    kept = (order < n).view(out, -1)[:, :width]
    kept[out // 2] = False
    return torch.where(kept, weight, 0.0), kept


@pytest.mark.parametrize(("n", "m"), [(16, 64), (8, 64), (5, 64), (8, 32), (4, 16), (1, 4)])
def test_picked_weights_give_the_bits_of_dense_ones(isa, n, m):
    for out, width in [*SHAPES, (48, 1536)]:
        weight, kept = n_of_m(out, width, n, m)
        picked, dense = (
            pack_sparse(weight, kept, "int8", bias=torch.linspace(-1, 1, out), picked=True),
            pool("portable").pack(weight, "int8", torch.linspace(-1, 1, out)),
        )
        assert picked.picks == (0 if not kept.any() else -(-int(_most_per_group(kept)) // 4) * 4)
        assert torch.equal(picked.unpack(), dense.unpack())
        for rows in ROWS:
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
            assert torch.equal(pool(isa).linear(x, picked), pool(isa).linear(x, dense))


def _most_per_group(kept: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 64))
    return padded.view(len(kept), -1, 64).sum(-1).max()


def test_extreme_weights_and_inputs_do_not_overflow_what_is_picked(isa):
    weight, kept = n_of_m(32, 128, 16, 64)
    weight = torch.where(kept, weight.sign() * 3.0, 0.0)
    for sign in (1.0, -1.0):
        x = sign * torch.ones(3, 128)
        picked, dense = pack_sparse(weight, kept, "int8", picked=True), pool("portable").pack(weight, "int8")
        assert torch.equal(pool(isa).linear(x, picked), pool(isa).linear(x, dense))


@pytest.mark.parametrize(
    ("density", "n", "m", "picks"),
    [(0.25, 0, 0, 0), (0.05, 0, 0, 0), (0, 16, 64, 16), (0, 8, 32, 16), (0, 4, 64, 4), (0, 16, 32, 0)],
)
def test_weights_are_picked_where_groups_keep_as_many(monkeypatch, density, n, m, picks):
    weight, kept = n_of_m(64, 512, n, m) if n else pruned(64, 512, density)
    kept[32] = kept[31]
    for isa in usable_isas():
        monkeypatch.setenv("PACELINE_ISA", isa)
        fast = isa in ("avx512", "amx")
        assert pack_sparse(weight, kept, "int8").picks == (picks if fast else 0)
        assert pack_sparse(weight, kept, "bf16").picks == 0
    sizes = [pack_sparse(weight, kept, "int8", picked=picked).num_bytes for picked in (False, True)]
    if picks:
        assert sizes[1] <= 1.34 * sizes[0]


def test_stored_int8_is_not_rounded_again():
    weight, kept = pruned(40, 130, 0.5)
    values, scale = quantize_rows(weight)
    sparse, dense = pack_sparse(values, kept, "int8", scale), pack_rows(values, scale)
    assert sparse.unpack().count_nonzero() > 0
    assert torch.equal(sparse.unpack(), dense.unpack())


def test_stored_int8_can_be_packed_in_another_format():
    weight, kept = pruned(40, 130, 0.5)
    values, scale = quantize_rows(weight)
    assert torch.equal(pack_sparse(values, kept, "fp32", scale).unpack(), values * scale[:, None])


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_of_the_kept_values_and_a_bit_for_every_weight(format):
    weight, kept = pruned(64, 128, 0.5)
    size = {"fp32": 4, "bf16": 2, "int8": 1}[format]
    sparse = pack_sparse(weight, kept, format)
    assert sparse.tile_starts is not None
    assert int(sparse.tile_starts[-1]) == 64 * 128 // 8 + int(kept.sum()) * size
    assert len(sparse.data) == int(sparse.tile_starts[-1]) + 64


def _each_linear(layer: LayerPlan, change: Callable[[PackedLinear], PackedLinear]) -> LayerPlan:
    return replace(
        layer,
        qkv=change(layer.qkv),
        output=change(layer.output),
        gate_up=change(layer.gate_up),
        down=change(layer.down),
    )


def _pruned(dense: PackedLinear) -> PackedLinear:
    weight = dense.unpack()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(weight))) < 0.4
    return pack_sparse(torch.where(kept, weight, 0.0), kept, dense.format)


def _picked(dense: PackedLinear) -> PackedLinear:
    weight = dense.unpack()
    kept = torch.rand(len(weight), -(-weight.shape[1] // 16), 16).argsort(-1) < 4
    kept = kept.view(len(weight), -1)[:, : weight.shape[1]]
    packed = pack_sparse(torch.where(kept, weight, 0.0), kept, dense.format, picked=True)
    assert bool(packed.picks) == (dense.format == "int8")
    return packed


def _densified(sparse: PackedLinear) -> PackedLinear:
    return pool("portable").pack(sparse.unpack(), sparse.format)


@pytest.mark.parametrize(("format", "prune"), [*((format, _pruned) for format in FORMATS), ("int8", _picked)])
def test_a_decoder_of_sparse_linears_equals_its_dense_copy_in_any_batch(isa, format, prune):
    """Gate and up in pairs, residual adds and look-ahead included; ffn 72 leaves a half tile."""
    shape = Shape(layers=2, hidden=48, ffn=72, heads=3, kv_heads=1, head_dim=16, vocab=50)
    plan = random_plan(shape, format, pool("portable"))
    sparse = replace(plan, layers=tuple(_each_linear(layer, prune) for layer in plan.layers))
    dense = replace(sparse, layers=tuple(_each_linear(layer, _densified) for layer in sparse.layers))
    tokens, spans = list(range(23)), [(0, 9, 0, [0]), (9, 14, 0, [1])]
    results = []
    for some in (sparse, dense, plan):
        model = executor(some, pool(isa), blocks=4)
        results.append(model.forward(tokens, spans, list(range(23))))
    alone = executor(sparse, pool(isa, 1), blocks=4)
    one_by_one = [alone.forward([t], [(0, 1, t, [0])], [0]) for t in range(9)]
    # int8 rounds a dense copy's rows anew, to the same integers; scales may differ in the last bit.
    if format == "int8":
        assert torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=0.1)
    assert torch.equal(torch.cat(one_by_one), results[0][:9])
