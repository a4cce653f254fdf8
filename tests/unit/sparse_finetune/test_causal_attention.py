"""Attention in blocks is torch's attention, over several blocks, with and without windows, and so are its gradients."""

import pytest
import torch
from torch.nn import functional as F

from paceline.draftmodels.distill.layout import Padded
from paceline.draftmodels.finetune.attention import CausalAttend, query_blocks


@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
def test_blocks_are_the_whole(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, width, heads, kv_heads, size = (19, 7), 19, 6, 2, 8
    slots = torch.tensor([b * width + i for b, length in enumerate(lengths) for i in range(length)])
    place = Padded(slots, 2, width)
    q, k, v = (
        torch.randn(sum(lengths), n, size, generator=generator, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    blocks = query_blocks(width, window, torch.float32, torch.device("cpu"), block=4)
    assert len(blocks) == 5
    ours = CausalAttend(place, k, v, blocks)(q)

    distance = torch.arange(width)[:, None] - torch.arange(width)
    mask = (distance >= 0) & (distance < (window or width))
    queries, keys, values = (place.spread(x).transpose(1, 2) for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    expected = place.collect(theirs.transpose(1, 2)).flatten(1)
    assert torch.allclose(ours, expected, atol=1e-5)

    weights = torch.randn(ours.shape, generator=generator)
    found = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_a_block_reads_only_the_keys_that_are_seen() -> None:
    blocks = query_blocks(300, 64, torch.float32, torch.device("cpu"), block=128)
    assert [(b.start, b.stop, b.first) for b in blocks] == [(0, 128, 0), (128, 256, 65), (256, 300, 193)]
    assert [b.bias.shape for b in blocks] == [(128, 128), (128, 191), (44, 107)]
