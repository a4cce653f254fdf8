"""The loss of a model on held-out text, over the same tokens that training learns, in the arithmetic of training."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.finetune.arithmetic import autocast
from paceline.draftmodels.finetune.batch import Batch
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.draftmodels.finetune.objective import CHUNK_ROWS


def learnt_states(model: Decoder, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What the head reads at the rows with a loss, fp32 [learnt rows, hidden]."""
    with autocast(model.head.device, dtype):
        states: Tensor = model(batch)[-1][batch.learnt]
    return states


def chunks(rows: int) -> Iterator[slice]:
    """Rows in pieces whose logits fit into memory."""
    return (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))


@torch.no_grad()
def held_out_loss(model: Decoder, batches: Sequence[Batch], dtype: torch.dtype) -> float:
    """Mean cross entropy in nats per learnt token.

    Args:
        dtype: of matrix products.
    """
    head, total = model.head.to(dtype), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        states = learnt_states(model, batch, dtype)
        for part in chunks(len(states)):
            logits = F.linear(states[part].to(dtype), head).float()
            total += F.cross_entropy(logits, batch.labels[part], reduction="sum").double().cpu()
    return float(total) / max(sum(len(batch.labels) for batch in batches), 1)


def perplexity(nats: float) -> float:
    """exp, finite also for a model that is broken beyond measure."""
    return math.exp(min(nats, 700.0))
