"""Which ids a draft of a restricted vocabulary proposes: those that the target writes most."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paceline.server.errors import ConfigError


def draft_vocabulary(
    outputs: Iterable[Sequence[int]], size: int, *, vocab_size: int, always: Iterable[int] = ()
) -> Tensor:
    """The most frequent ids of the target's own outputs.

    Args:
        outputs: ids that the target wrote, without prompts (``TokenSequence.answer``).
        size: how many ids to choose.
        vocab_size: the target's.
        always: ids to choose in any case: those that end a turn or a text, without which a draft never stops.

    Returns:
        int32 [size], ascending. Of ids that are equally frequent the lower ones are chosen; where too few occur, the
        lowest of the others fill up.

    Raises:
        ConfigError: more ids than the target has, or fewer than must be chosen.
    """
    chosen = set(always)
    if not max(1, len(chosen)) <= size <= vocab_size:
        raise ConfigError(
            f"a draft vocabulary of {size} ids is impossible: the target has {vocab_size}, "
            f"{len(chosen)} of which end a turn or a text and must be among them"
        )
    counts = Counter(token for output in outputs for token in output)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    for token in (*ranked, *range(vocab_size)):
        if len(chosen) == size:
            break
        chosen.add(token)
    return torch.tensor(sorted(chosen), dtype=torch.int32)
