"""What the engine's verification saw: one record per verified block, with sum_v min(p, q) at the examined positions.

The counterpart of ``server.engine.examine``. Blocks are added on the engine thread; ``take`` is called elsewhere, after
a request's last event, when nothing more is added for it.
"""

import torch
from torch import Tensor

from paceline.draftmodels.evaluate.answers import Block
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.request import Request


class BlockExaminer:
    """Collects the blocks of each request.

    Attributes:
        wants_overlaps: compute sum_v min(p, q), which costs time. Off in passes whose speed counts.
    """

    def __init__(self) -> None:
        self.wants_overlaps = False
        self._blocks: dict[str, list[Block]] = {}

    def on_block(
        self, request: Request, source: str, block: DraftBlock, accepted: int, scores: Tensor | None
    ) -> None:
        """See ``Examiner.on_block``."""
        drafted = len(block.token_ids)
        found = None
        if self.wants_overlaps and is_known(request):
            examined = min(accepted + 1, drafted)
            if request.sampling.temperature == 0:
                found = tuple(float(i < accepted) for i in range(examined))
            else:
                assert scores is not None
                found = tuple(overlaps(scores[:examined], block).tolist())
        self._blocks.setdefault(request.id, []).append(Block(source, drafted, accepted, found))

    def take(self, request_id: str) -> tuple[Block, ...]:
        """The blocks of a finished request, which is forgotten."""
        return tuple(self._blocks.pop(request_id, ()))


def is_known(request: Request) -> bool:
    """Whether the engine keeps q for a request: with a seed, tokens are compared and it is not needed."""
    return request.sampling.temperature == 0 or request.sampling.seed is None


@torch.inference_mode()
def overlaps(scores: Tensor, block: DraftBlock) -> Tensor:
    """sum_v min(p(v), q(v)), the probability that a token drawn from q is accepted (2211.17192, theorem 3.5).

    Args:
        scores: fp32 [n, V] at the first n draft positions; p = softmax(scores).
        block: at least n draft tokens; q is its ``probs``, or one-hot without them.

    Returns:
        fp32 [n] in [0, 1].
    """
    p = scores.softmax(dim=-1)
    if block.probs is not None:
        q = block.probs[: len(p)]
        p = p[:, : q.shape[1]] if block.columns is None else p.index_select(1, block.columns)
        return torch.minimum(p, q).sum(dim=-1).clamp_(max=1.0)
    tokens = torch.tensor(block.token_ids[: len(p)], device=scores.device)
    return p.gather(1, tokens.unsqueeze(1)).squeeze(1)
