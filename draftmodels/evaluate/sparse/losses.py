"""How far a student is from its parent on the same text, teacher-forced through the runners that serve.

Both models run as they are served: their weights' format, their kernels, K and V through the cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.server.engine.batch import Batch
from paceline.server.engine.build import make_runner
from paceline.server.engine.kv_arena import KvArena, MemberShape
from paceline.server.engine.kv_blocks import BlockTable, KvBlocks
from paceline.server.models.loader import LoadedModel, ModelLoader
from paceline.server.models.quality import compare

_BLOCK_TOKENS = 16
#: Rows per forward: 128 rows of 150,000 logits are 78 MB.
_ROWS = 128
TASK = "last-word"


@dataclass(frozen=True, slots=True)
class Losses:
    """A student against its parent.

    Attributes:
        kl_nats: mean over positions of KL(parent || student).
        top1_agreement: share of positions where both find the same token most probable.
        n_tokens: positions.
        task_accuracy: of ``task``, the student's; None without anything to judge, as for ``parent_task_accuracy``.
        n_task: how many words were judged.
    """

    kl_nats: float
    top1_agreement: float
    perplexity: float
    parent_perplexity: float
    n_tokens: int
    task: str
    task_accuracy: float | None
    parent_task_accuracy: float | None
    n_task: int


def measure_losses(
    parent: LoadedModel,
    student: LoadedModel,
    sequences: Sequence[TokenSequence],
    words: Sequence[Sequence[range]],
    loader: ModelLoader,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Losses:
    """Run both over all sequences.

    Args:
        words: per sequence, the token positions of the words of the task.
        loader: that loaded both.
        progress: told the tokens of every finished sequence.
    """
    longest = max(len(sequence.tokens) for sequence in sequences)
    readers = [_Reader(model, loader, longest) for model in (parent, student)]
    sums, hits, judged, positions = torch.zeros(4, dtype=torch.float64), [0, 0], 0, 0
    for sequence, own in zip(sequences, words, strict=True):
        right: tuple[list[Tensor], list[Tensor]] = ([], [])
        for (dense, labels), (sparse, _) in zip(*(r.rows(sequence) for r in readers), strict=True):
            sums += compare(sparse, dense.log_softmax(-1), labels).cpu()
            for found, logits in zip(right, (dense, sparse), strict=True):
                found.append(logits.argmax(-1) == labels)
        # Row 0 predicts the first token that counts.
        for index, found in enumerate(right):
            hits[index] += _whole_words(torch.cat(found), own, sequence.prompt_tokens)
        judged += len(own)
        positions += sequence.answer_tokens
        progress(len(sequence.tokens))
    kl, nll, parent_nll, agreed = (sums / positions).tolist()
    shares = [count / judged if judged else None for count in hits]
    return Losses(
        kl, agreed, math.exp(nll), math.exp(parent_nll), positions, TASK, shares[1], shares[0], judged
    )


def _whole_words(right: Tensor, words: Sequence[range], first: int) -> int:
    """How many words have each token right; ``right`` bool [answer tokens] begins at token ``first``."""
    return sum(bool(right[word.start - first : word.stop - first].all()) for word in words)


class _Reader:
    """One model over KV memory for one sequence."""

    def __init__(self, model: LoadedModel, loader: ModelLoader, longest: int) -> None:
        shape = MemberShape(f"{model.key}/read", model.config, model.kv_dtype)
        size = -(-longest // _BLOCK_TOKENS) * _BLOCK_TOKENS * shape.bytes_per_token
        arena = KvArena([shape], block_size=_BLOCK_TOKENS, total_bytes=size, device=loader.device)
        self._runner = make_runner(model, shape, arena, loader.pool)
        self._num_blocks, self._device = arena.num_blocks, loader.device

    def rows(self, sequence: TokenSequence) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits fp32 [rows, vocab], next tokens int64 [rows]) of all rows that predict tokens that count."""
        tokens, given = sequence.tokens, sequence.prompt_tokens
        table, blocks = BlockTable(self._runner.layout), KvBlocks(self._num_blocks, prefix_caching=False)
        grown = blocks.grow([(table, len(tokens))])
        assert grown, "there is room for the longest sequence"
        for start in range(0, len(tokens) - 1, _ROWS):
            stop = min(start + _ROWS, len(tokens) - 1)
            batch = Batch()
            wanted = max(0, stop - max(start, given - 1))
            batch.add(table, tokens[start:stop], num_wanted=wanted)
            table.num_computed = stop
            logits = self._runner.forward(batch)
            if wanted:
                labels = torch.tensor(tokens[stop - wanted + 1 : stop + 1], device=self._device)
                yield logits, labels
