"""Which ids a draft of a restricted vocabulary proposes: those that the target would write most.

Counted by the target's probabilities, not by the tokens that were drawn: over a few thousand positions this knows rare
ids far better than counts of the same text.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paceline.draftmodels.distill.objective import Rows
from paceline.server.errors import ConfigError

#: Ids per position that are counted; what lies beyond has no weight in any draft.
TOP_K = 256


def expected_vocabulary(
    rows: Iterable[Rows], size: int, *, vocab_size: int, always: Sequence[int] = ()
) -> tuple[Tensor, float]:
    """The ids of the largest expected number in the target's text.

    Args:
        rows: of the target's own text, top-k over the whole vocabulary.
        size: how many ids.
        vocab_size: the target's.
        always: ids to choose in any case: those that end a turn or a text.

    Returns:
        (int32 [size] ascending, the target's mean probability of all chosen ids).

    Raises:
        ConfigError: more ids than the target has, or fewer than must be chosen.
    """
    if not max(1, len(set(always))) <= size <= vocab_size:
        raise ConfigError(
            f"draft_vocab: {size} ids are impossible; the target has {vocab_size}, {len(set(always))} of which end "
            "a turn or a text and must be among them"
        )
    mass, positions = torch.zeros(vocab_size, dtype=torch.float64), 0
    for row in rows:
        assert row.ids is not None
        mass.index_add_(0, row.ids.flatten().long().cpu(), row.log_p.flatten().double().exp().cpu())
        positions += len(row.log_p)
    preferred = mass.clone()
    preferred[list(always)] = torch.inf
    # Stable, so that ids that never occur come in order: lower ids are more frequent in most tokenizers.
    chosen = preferred.argsort(descending=True, stable=True)[:size].sort().values
    return chosen.int(), float(mass[chosen].sum() / max(positions, 1))
