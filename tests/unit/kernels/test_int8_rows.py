"""The artifact's int8: rounds as the packer does, and is packed value by value."""

import pytest
import torch
from native_kernels import pool, require_native

from paceline.kernels.cpu.int8 import pack_rows, quantize_rows

SHAPES = [(1, 1), (16, 64), (17, 65), (100, 257)]


def weights(out: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator) * torch.logspace(-6, 3, out)[:, None]
    weight[out // 2] = 0.0
    return weight


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_quantizing_before_or_after_storing_gives_the_same_bits(out, width):
    require_native()
    weight, bias = weights(out, width), torch.randn(out)
    values, scale = quantize_rows(weight)
    assert values.dtype is torch.int8
    assert values.min() >= -127
    expected = pool("portable").pack(weight, "int8", bias)
    packed = pack_rows(values, scale, bias)
    assert torch.equal(packed.data, expected.data)
    assert expected.scale is not None
    assert packed.scale is not None
    assert torch.equal(packed.scale, expected.scale)
    assert packed.bias is not None
    assert expected.bias is not None
    assert torch.equal(packed.bias, expected.bias)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_values_are_kept_whatever_they_are(out, width):
    """Rows that do not reach 127, which rounding again would stretch."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(-60, 61, (out, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, generator=generator)
    packed = pack_rows(values, scale)
    assert torch.equal(packed.unpack(), values.float() * scale[:, None])
    assert (packed.out_features, packed.in_features) == (out, width)
    assert packed.bias is None


def test_halves_round_to_even_and_other_types_are_taken():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5]], dtype=torch.bfloat16)
    values, scale = quantize_rows(weight)
    assert values.tolist() == [[127, 0, 2, -2]]
    assert scale.tolist() == [1.0]
