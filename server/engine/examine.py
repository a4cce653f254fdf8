"""The seam for looking at verified draft blocks: offline measurement needs p and q, which statistics do not carry."""

from typing import Protocol

from torch import Tensor

from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.request import Request


class Examiner(Protocol):
    """Sees every verified block on the engine thread, after the step's times are taken; must not raise."""

    def on_block(
        self, request: Request, source: str, block: DraftBlock, accepted: int, scores: Tensor | None
    ) -> None:
        """A block of K >= 1 draft tokens was verified.

        Args:
            source: name of the proposer that drafted it.
            block: its tokens, with q where the verification needed it.
            accepted: how many were accepted.
            scores: fp32 [K + 1, V] after ``sampler.process``, with p = softmax(scores) where the request is sampled;
                None where all of the step was plain greedy. Not to be kept or changed: it may be the engine's own.
        """
        ...
