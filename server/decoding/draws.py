"""A row as native drafting reads it: sampling parameters, penalties and biases as edits of logits, noise, uniforms.

The order of operations is ``sampler.process``'s. Draft tokens are verified against what they were drawn from:
nothing here can change a distribution, and what it gets wrong costs acceptance only.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.drafting import Draw, Edit
from paceline.server.decoding.noise import stream
from paceline.server.decoding.rows import Row, is_greedy, is_seeded, is_unseeded
from paceline.server.decoding.sampler import random_uniforms


class DrawMaker:
    """Makes draws for one draft.

    Args:
        vocab_ids: token id of each of the draft's logits, ascending, int32 [k]; None is the id itself.
        columns: logits that may be drawn, the first ones.
    """

    def __init__(self, vocab_ids: Tensor | None, columns: int) -> None:
        ids = range(columns) if vocab_ids is None else vocab_ids[:columns].tolist()
        self._column_of = {token: column for column, token in enumerate(ids)}

    def draws(
        self, rows: Sequence[Row], wishes: Sequence[tuple[int, int]], generator: torch.Generator
    ) -> list[Draw]:
        """How to draft for each row.

        Args:
            rows: the position of each sequence's first draft token.
            wishes: (index of the sequence in the batch, tokens to draft).
            generator: numbers for the unseeded rows; left untouched if there are none.
        """
        sampled = [length for row, (_, length) in zip(rows, wishes, strict=True) if is_unseeded(row)]
        uniforms: list[Tensor] = []
        if sampled:
            numbers = random_uniforms((sum(sampled),), generator, torch.device("cpu"))
            uniforms = [numbers] if len(sampled) == 1 else list(torch.split(numbers, sampled))
        drawn = iter(uniforms)
        return [
            self._draw(row, wish, next(drawn) if is_unseeded(row) else None)
            for row, wish in zip(rows, wishes, strict=True)
        ]

    def _draw(self, row: Row, wish: tuple[int, int], uniforms: Tensor | None) -> Draw:
        s = row.sampling
        index, length = wish
        return Draw(
            index,
            length,
            mode="greedy" if is_greedy(row) else "seeded" if is_seeded(row) else "sampled",
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition=s.repetition_penalty,
            presence=s.presence_penalty,
            frequency=s.frequency_penalty,
            edits=self._edits(row),
            noise=0 if s.seed is None else stream(s.seed, row.choice),
            position=row.position,
            uniforms=uniforms,
        )

    def _edits(self, row: Row) -> list[Edit]:
        s = row.sampling
        repeated = set(row.prompt_ids).union(row.output_ids) if s.repetition_penalty != 1 else set()
        counts = Counter(row.output_ids) if s.presence_penalty or s.frequency_penalty else Counter()
        masked = set(row.masked_until_min_tokens) if len(row.output_ids) < s.min_tokens else set()
        column_of = self._column_of
        return [
            Edit(
                column_of[token],
                bias=s.logit_bias.get(token, 0.0),
                penalty=s.repetition_penalty if token in repeated else 1.0,
                shift=-math.inf if token in masked else -_penalty(row, counts[token]),
                counted=token in counts,
            )
            for token in repeated | counts.keys() | masked | s.logit_bias.keys()
            if token in column_of
        ]


def _penalty(row: Row, count: int) -> float:
    s = row.sampling
    return s.presence_penalty + s.frequency_penalty * count if count else 0.0
