"""Packed formats: exact round trips, sizes, gate and up rows, one buffer; and argmax."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from native_kernels import executor, load_plan, pool, require_native

from paceline.kernels import ops
from paceline.kernels.cpu.memory import compact, huge_pages
from paceline.kernels.formats import FORMATS, interleave_rows, padded

SHAPES = [(1, 1), (16, 64), (17, 65), (33, 130), (100, 257)]


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_unpacking_gives_back_what_was_packed(isa, out, width):
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator)
    assert torch.equal(pool(isa).pack(weight, "fp32").unpack(), weight)
    assert torch.equal(pool(isa).pack(weight, "bf16").unpack(), weight.bfloat16().float())
    whole = torch.randint(-127, 128, (out, width), generator=generator).float()
    whole[:, 0] = 127.0
    whole *= 2.0 ** -torch.arange(out)[:, None]  # scales that divide exactly
    assert torch.equal(pool(isa).pack(whole, "int8").unpack(), whole)
    rounded = pool(isa).pack(weight, "int8")
    assert rounded.scale is not None
    assert ((rounded.unpack() - weight).abs() <= 0.501 * rounded.scale[:out, None]).all()


def test_packing_takes_other_types_and_layouts(isa):
    weight = torch.randn(20, 40)
    for format in FORMATS:
        expected = pool(isa).pack(weight.bfloat16().float(), format)
        assert torch.equal(pool(isa).pack(weight.bfloat16(), format).data, expected.data)
        transposed = weight.bfloat16().T.contiguous().T
        assert torch.equal(pool(isa, 3).pack(transposed, format).data, expected.data)


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_sizes(format, out, width):
    require_native()
    layer = pool("portable").pack(torch.randn(out, width), format, torch.randn(out))
    element, rows = {"fp32": 4, "bf16": 2, "int8": 1}[format], padded(out, 16)
    size = rows * padded(width, 64 if format == "int8" else 4) * element
    assert layer.data.numel() == size
    assert layer.num_bytes == size + rows * 4 * (2 if format == "int8" else 1)
    assert layer.bias is not None
    assert not layer.bias[out:].any()


@pytest.mark.parametrize("ffn", [1, 16, 37])
def test_gate_and_up_rows_alternate_in_tiles(ffn):
    gate, up = torch.arange(1.0, ffn + 1), -torch.arange(1.0, ffn + 1)
    flat = interleave_rows(gate, up)
    assert flat.shape == (2 * padded(ffn, 16),)
    tiles = flat.view(-1, 2, 16)
    assert torch.equal(tiles[:, 0].reshape(-1)[:ffn], gate)
    assert torch.equal(tiles[:, 1].reshape(-1)[:ffn], up)
    assert not tiles[:, :].transpose(0, 1).reshape(2, -1)[:, ffn:].any()
    matrix = interleave_rows(gate[:, None].expand(ffn, 3), up[:, None].expand(ffn, 3))
    assert torch.equal(matrix, flat[:, None].expand(-1, 3))


@pytest.mark.parametrize("format", FORMATS)
def test_compacting_keeps_every_value(isa, format, tiny_checkpoint):
    plan = load_plan(tiny_checkpoint("qwen2"), format)
    dense = compact(plan)
    for before, after in zip(plan.linears, dense.linears, strict=True):
        assert torch.equal(before.data, after.data)
        assert before.data.data_ptr() != after.data.data_ptr()
    ends = [layer.data.data_ptr() + layer.data.numel() for layer in dense.linears]
    starts = [layer.data.data_ptr() for layer in dense.linears]
    assert all(0 <= start - end < 64 for start, end in zip(starts[1:], ends, strict=False))
    assert starts[0] % (2 << 20) == 0
    runs = []
    for p in (plan, dense):
        ex = executor(p, pool(isa), torch.float32, num_blocks=1)
        runs.append(ex.forward([5, 6, 7], [(0, 3, 0, [0])], [0, 1, 2]))
    assert torch.equal(*runs)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what a mapping is")
def test_weights_lie_in_memory_that_linux_gives_huge_pages():
    """Advised (hg), and not shared (sh): shared memory gets none unless the machine was set up for it."""
    buffer = huge_pages(3 << 20)
    start = buffer.data_ptr()
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= start < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert "rd" in flags
    assert "hg" in flags
    assert "sh" not in flags


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1000])
def test_argmax_takes_the_lowest_of_equals_wherever_it_is(isa, columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randint(-3, 4, (40, columns), generator=generator).float()  # ties everywhere
    x[0] = -torch.inf
    x[1] = torch.inf
    x[2] = -torch.inf
    x[2, -1] = -1e30
    x[3] = 0.0
    x[3, -1] = 1.0
    expected = [row.index(max(row)) for row in x.tolist()]
    assert expected[:4] == [0, 0, columns - 1, columns - 1]
    for threads, rows in itertools.product((1, 3), (1, 2, 40)):
        got = ops.argmax(x[:rows], pool(isa, threads))
        assert got.dtype is torch.int32
        assert got.tolist() == expected[:rows]
    assert ops.argmax(x).tolist() == expected  # the reference
    assert ops.argmax(x.T.contiguous().T, pool(isa)).tolist() == expected


def test_argmax_refuses_what_has_none():
    with pytest.raises(ValueError, match="without columns"):
        ops.argmax(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="int32"):
        ops.argmax(torch.zeros(3, 2, dtype=torch.int32))
