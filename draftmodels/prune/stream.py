"""Texts on their way through a model, one block at a time: all that is kept is the state of every row.

Rows are packed and padded for attention as in training (``distill.layout``), sequences of like length together.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill.blocks import Attend, Block, Positions
from paceline.draftmodels.distill.layout import BatchLayout, lay_out
from paceline.draftmodels.prune.inputs import Grams, Products
from paceline.draftmodels.prune.pool import Pool
from paceline.server.models.config import ModelConfig

#: Rows per forward; sums over them are made in fp32 before they are added up in fp64.
ROWS = 1024


class Stream:
    """States before the next block.

    Args:
        sequences: each of at least two tokens.
        embedding: [vocabulary, hidden], on the device to compute on.
        pool: batches run on its threads.
    """

    def __init__(
        self, sequences: Sequence[TokenSequence], config: ModelConfig, embedding: Tensor, pool: Pool
    ) -> None:
        self._pool = pool
        self._batches = _batched(sequences)
        self._positions, self._windows = Positions(config), config.sliding_windows
        self._device = embedding.device
        #: fp32 [rows, hidden] per batch.
        self.states = [F.embedding(self._layout(batch).tokens, embedding).float() for batch in self._batches]

    def twin(self) -> "Stream":
        """The same texts and states, to go another way; states are replaced, never written into."""
        other = copy(self)
        other.states = list(self.states)
        return other

    def through(
        self,
        block: Block,
        layer: int,
        *,
        move: bool = True,
        grams: Grams | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a block over all texts.

        Args:
            layer: its number.
            move: whether its outputs become the states.
            grams: what its linears' inputs are added to, batch after batch in order.
            after: called after each batch.
        """

        def run(index: int) -> tuple[Tensor, Products]:
            if grams is None:
                return self._run(block, layer, index), {}
            with grams.listening() as products:
                return self._run(block, layer, index), products

        for index, (output, products) in enumerate(self._pool.map(run, range(len(self._batches)))):
            if move:
                self.states[index] = output
            if grams is not None:
                grams.add(products)
            after()

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """Per batch: the states that predict what follows the prompts, fp32 [n, hidden], and those tokens, [n]."""
        found = []
        for batch, states in zip(self._batches, self.states, strict=True):
            labels = [token for sequence in batch for token in sequence.answer]
            rows = self._layout(batch).answers
            found.append((states[rows], torch.tensor(labels, device=self._device)))
        return found

    def _layout(self, batch: Sequence[TokenSequence]) -> BatchLayout:
        """Made anew each time: the masks of long texts are larger than their states."""
        return lay_out(batch, self._device)

    def _run(self, block: Block, layer: int, index: int) -> Tensor:
        layout, x = self._layout(self._batches[index]), self.states[index]
        angles = self._positions.angles(layout.positions)
        normed = block.normed(x)
        keys, values = (layout.place.spread(part) for part in block.keys_values(normed, angles))
        mask = layout.mask(1, answers=False, window=self._windows[layer])
        output: Tensor = block(x, normed, angles, Attend(layout.place, (keys,), (values,), mask))
        return output


def _batched(sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    """Longest first, at most ``ROWS`` rows of padded length together."""
    batches: list[list[TokenSequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.tokens), reverse=True):
        width = len(batches[-1][0].tokens) if batches else ROWS
        if not batches or (len(batches[-1]) + 1) * width > ROWS:
            batches.append([])
        batches[-1].append(sequence)
    return batches
