"""Log-probabilities that the API reports.

Owns one pure function over raw logits (the combined logits before bias, penalties and temperature), in nats.
Ties keep the lower token id. Knows nothing of sampling parameters beyond how many alternatives were asked
for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.server.engine.request import TokenLogprob

#: Rows per pass: bounds the extra memory when a whole prompt is scored (64 rows of 150k logits are 38 MB).
_ROWS_PER_PASS = 64


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top_k: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row, and of the row's most likely tokens.

    Args:
        logits: fp32 [R, V], raw.
        token_ids: R tokens to report.
        top_k: how many alternatives, per row; at most V.

    Returns:
        R entries; ``top`` has exactly ``top_k`` pairs, most likely first.
    """
    assert len(token_ids) == len(top_k) == logits.shape[0], (
        f"{len(token_ids)} tokens for {logits.shape[0]} rows"
    )
    result: list[TokenLogprob] = []
    for start in range(0, logits.shape[0], _ROWS_PER_PASS):
        rows = slice(start, start + _ROWS_PER_PASS)
        result += _pass(logits[rows], token_ids[rows], top_k[rows])
    return result


def _pass(logits: Tensor, token_ids: Sequence[int], top_k: Sequence[int]) -> list[TokenLogprob]:
    logprobs = logits.log_softmax(dim=-1)
    ids = _most_likely(logits, max(top_k))
    chosen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    values = logprobs.gather(1, torch.cat([chosen, ids], dim=1)).tolist()
    return [
        TokenLogprob(token, row[0], tuple(zip(top[:k], row[1 : k + 1], strict=True)))
        for token, row, top, k in zip(token_ids, values, ids.tolist(), top_k, strict=True)
    ]


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Token ids of the highest logits, best first, lower ids first among equals: int64 [R, count]."""
    # One more than wanted shows whether equals were cut off; topk itself orders equals arbitrarily.
    highest, ids = logits.topk(min(count + 1, logits.shape[1]), dim=-1)
    tied = (highest[:, 1:] == highest[:, :-1]).any(dim=1).nonzero().squeeze(1)
    ids = ids[:, :count]
    if len(tied):
        ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return ids
