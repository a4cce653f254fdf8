"""Perplexity of the pruned model beside the dense one's, from the states that both give for the same texts."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.prune.pool import Pool
from paceline.draftmodels.prune.stream import Stream
from paceline.server.models.config import EMBEDDING, FINAL_NORM, HEAD, ModelConfig
from paceline.server.models.llama import Fetch
from paceline.server.models.quality import Quality, compare

#: Rows of logits at a time: 256 rows of 150,000 logits are 154 MB.
_ROWS = 256


def compare_streams(dense: Stream, pruned: Stream, config: ModelConfig, fetch: Fetch, pool: Pool) -> Quality:
    """Next-token predictions after the last block, on the tokens that follow the prompts.

    Args:
        dense, pruned: the same texts after all blocks of either model; norm and head are the same of both.
        fetch: gives tensors in fp32.
    """
    norm, head = fetch(FINAL_NORM), fetch(EMBEDDING if config.tied_head else HEAD)

    def compared(rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        expected, got, labels = rows
        normed = [F.rms_norm(states, norm.shape, norm, config.rms_eps) for states in (expected, got)]
        return compare(F.linear(normed[1], head), F.linear(normed[0], head).log_softmax(-1), labels)

    sums, positions = torch.zeros(4, dtype=torch.float64), 0
    rows = list(_rows(dense, pruned))
    for (*_, labels), part in zip(rows, pool.map(compared, rows), strict=True):
        sums += part.cpu()
        positions += len(labels)
    kl, nll, dense_nll, agreed = (sums / positions).tolist()
    return Quality(kl, math.exp(nll), math.exp(dense_nll), agreed, positions)


def _rows(dense: Stream, pruned: Stream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(dense states, pruned states, next tokens), at most ``_ROWS`` at a time."""
    for (expected, labels), (got, _) in zip(dense.answers(), pruned.answers(), strict=True):
        yield from zip(*(torch.split(part, _ROWS) for part in (expected, got, labels)), strict=True)
