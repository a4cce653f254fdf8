"""What the tensor functions of this room need to know about one row of logits.

A row is one position of one choice: where the next token of that choice is about to be chosen, either after all
of its committed output or after a drafted prefix. Rows carry token ids and parameters only: no tensors, no KV
blocks, no HTTP. The engine builds them; nothing here changes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.server.engine.request import SamplingParams


@dataclass(slots=True)
class Row:
    """One position whose next token is to be chosen.

    Attributes:
        sampling: the request's parameters.
        prompt_ids: the prompt; rows of one choice should share the object, its tokens are then gathered once.
        output_ids: committed output plus the drafted tokens before this position.
        masked_until_min_tokens: end-of-sequence and stop ids, masked while ``len(output_ids)`` is below
            ``sampling.min_tokens``.
        choice: index of the choice within its request (for seeded noise).
        position: index in the sequence (prompt and output) of the token about to be drawn.
    """

    sampling: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    masked_until_min_tokens: Sequence[int]
    choice: int
    position: int


def is_greedy(row: Row) -> bool:
    """Temperature 0: the token is the argmax, whatever the seed."""
    return row.sampling.temperature == 0


def is_seeded(row: Row) -> bool:
    """Sampled with noise that is a pure function of the seed (coupled verification)."""
    return row.sampling.temperature != 0 and row.sampling.seed is not None


def is_unseeded(row: Row) -> bool:
    """Sampled with a generator's numbers."""
    return row.sampling.temperature != 0 and row.sampling.seed is None
