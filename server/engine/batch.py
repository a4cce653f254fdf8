"""One ragged batch for one member: which tokens run, where their K and V go, which rows need logits.

The only tensor is what a draft that reads states gets from whoever made the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.server.engine.kv_blocks import BlockTable
from paceline.server.models.attention import SequenceRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Rows of several sequences one after another, built with ``add``.

    Attributes:
        tokens: token id per row.
        sequences: one entry per sequence, in row order.
        wanted: rows whose logits are returned, in order.
        features: for a draft that reads states, fp32 [rows, hidden]: the state before each row.
    """

    tokens: list[int] = field(default_factory=list)
    sequences: list[SequenceRows] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    features: "Tensor | None" = None

    def add(self, table: BlockTable, tokens: Sequence[int], *, num_wanted: int) -> slice:
        """Append rows that continue a sequence after its computed tokens.

        Args:
            table: blocks that already have room for the new tokens.
            tokens: the new rows; none is allowed.
            num_wanted: how many of the last rows need logits.

        Returns:
            Where those rows' logits will lie in the forward's result.
        """
        first, start = len(self.tokens), table.num_computed
        self.tokens.extend(tokens)
        if tokens:
            self.sequences.append(SequenceRows(first, len(tokens), start, table.blocks))
        end, logits_start = len(self.tokens), len(self.wanted)
        self.wanted.extend(range(end - num_wanted, end))
        return slice(logits_start, len(self.wanted))
