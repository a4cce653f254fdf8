"""Linear layers: every format on every instruction set against the reference, and which results are equal bits."""

import itertools

import pytest
import torch
from native_kernels import pool, require_native
from torch import Tensor

from paceline.kernels import ops, reference
from paceline.kernels.cpu.library import Pool, usable_isas
from paceline.kernels.formats import FORMATS, Format, PackedLinear

#: (out, in): around the tile of 16 rows, the group of 64 inputs, and the padding of inputs to 4.
SHAPES = [(1, 1), (5, 3), (15, 64), (16, 63), (17, 65), (33, 130), (64, 64), (100, 257), (129, 192), (150, 2)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33]


def layer_of(format: Format, out: int, width: int, *, bias: bool) -> tuple[PackedLinear, Tensor]:
    generator = torch.Generator().manual_seed(1000 * out + width)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    weight *= torch.logspace(-2, 2, out)[:, None]  # scales differ from row to row
    values = torch.randn(out, generator=generator) if bias else None
    return pool("portable").pack(weight, format, values), weight


def inputs(rows: int, width: int) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    return x * torch.logspace(-3, 3, rows)[:, None]


def bound(x: Tensor, layer: PackedLinear) -> Tensor:
    """How far sums in fp32 may be off: n roundings of 2^-24, each of at most the sum of absolute products.

    Quantized inputs are the same integers on both sides, so int8 has the same bound; half a quantization step per
    input widens its absolute products.
    """
    weight = layer.unpack().abs()
    steps = x.abs().amax(-1, keepdim=True) / 254 if layer.format == "int8" else 0.0
    products = (x.abs() + steps) @ weight.T
    if layer.bias is not None:
        products = products + layer.bias[: layer.out_features].abs()
    return (layer.in_features + 4) * 2.0**-24 * products + 1e-30


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_linear_equals_the_reference(isa, format, bias, out, width):
    layer, weight = layer_of(format, out, width, bias=bias)
    for rows in ROWS:
        x = inputs(rows, width)
        got = ops.linear(x, layer, pool(isa))
        expected = ops.linear(x, layer)
        assert got.shape == (rows, out)
        assert ((got - expected).abs() <= bound(x, layer)).all()
    # Not trivially: the layer is the one that was asked for, up to its format.
    exact = x @ weight.T + (layer.bias[:out] if layer.bias is not None else 0.0)
    error = (got - exact).norm() / exact.norm()
    assert error < {"fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}[format]
    assert (got != 0).float().mean() > 0.9
    assert got.std() > 0.01 or got.numel() == 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out", "width"), [(150, 200), (17, 65)])
def test_a_row_has_equal_bits_in_any_batch_on_any_number_of_threads(isa, format, out, width):
    layer, _ = layer_of(format, out, width, bias=True)
    x = inputs(33, width)
    alone = torch.cat([pool(isa, 1).linear(x[i : i + 1], layer) for i in range(33)])
    for threads, rows in itertools.product((1, 2, 3), ROWS):
        order = torch.randperm(33, generator=torch.Generator().manual_seed(rows))[:rows]
        assert torch.equal(pool(isa, threads).linear(x[order], layer), alone[order])


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_integer_sums_are_exact_at_the_extremes(isa, groups):
    """Weights of +-127 and inputs that quantize to +-127, all scales 1: sums are integers below 2^24, so exact.

    A pair of products reaches 2 * 255 * 127 > 32767: 16-bit saturation or a wrong offset would show.
    """
    width = 64 * groups
    weight = torch.full((18, width), 127.0)
    weight[1] = -127.0
    weight[2, ::2] = -127.0
    weight[3:] = (
        torch.randint(0, 2, (15, width), generator=torch.Generator().manual_seed(groups)) * 254.0 - 127.0
    )
    x = weight.flip(0).clone()
    x[5, 1::2] = torch.randint(-127, 128, (width // 2,)).float()
    layer = pool(isa).pack(weight, "int8")
    assert layer.scale is not None
    assert (layer.scale[:18] == 1).all()
    expected = x.long() @ weight.long().T
    assert expected.abs().max() == 127 * 127 * width < 2**24
    assert torch.equal(pool(isa).linear(x, layer).long(), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_the_instruction_sets_that_fuse_give_equal_bits(format):
    """From AVX2 on all fuse multiply and add, in one order, so all formats agree; portable rounds between the two.

    With one group of inputs int8 does no float addition and all three agree.
    """
    require_native("avx512")
    for (out, width), rows in itertools.product(SHAPES, (1, 5, 9, 17, 48)):
        layer, _ = layer_of(format, out, width, bias=True)
        x = inputs(rows, width)
        results = {isa: pool(isa).linear(x, layer) for isa in usable_isas()}
        for wider in usable_isas()[2:]:
            assert torch.equal(results["avx2"], results[wider])
        if format == "int8" and width <= 64:
            assert torch.equal(results["portable"], results["avx512"])


def test_rows_and_layers_of_zeros_give_the_bias(isa):
    for format in FORMATS:
        layer, _ = layer_of(format, 20, 70, bias=True)
        assert layer.bias is not None
        x = torch.zeros(3, 70)
        assert torch.equal(pool(isa).linear(x, layer), layer.bias[:20].expand(3, 20))
        zeros = pool(isa).pack(torch.zeros(20, 70), format)
        assert torch.equal(pool(isa).linear(inputs(3, 70), zeros), torch.zeros(3, 20))


def test_activations_are_quantized_to_127_with_ties_to_even():
    x = torch.zeros(2, 65)
    x[0, :4] = torch.tensor([254.0, 1.0, 3.0, -5.0])  # step 2: halves
    x[1, 64] = -0.5
    values, scales = reference.quantize_activations(x)
    assert values[0, 0, :4].tolist() == [127, 0, 2, -2]
    assert values[1, 1, 0] == -127
    assert scales.tolist() == [[2.0, 0.0], [0.0, 0.5 / torch.tensor(127.0)]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 9), "9 columns"),
        (torch.zeros(8), "fp32"),
        (torch.zeros(2, 8, dtype=torch.float64), "float64"),
        (torch.zeros(2, 8, device="meta"), "meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    require_native()
    layer = pool("portable").pack(torch.ones(4, 8), "fp32")
    for threads in (None, pool("portable")):
        with pytest.raises(ValueError, match=message):
            ops.linear(x, layer, threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_item_is_left_out_when_there_are_more_than_a_claim_can_count(threads):
    require_native()
    rows = torch.randn(2 * 65_536 + 77, 16)
    assert torch.equal(Pool(threads).argmax(rows).long(), rows.argmax(-1))
