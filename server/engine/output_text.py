"""What one choice says, token by token: its text, and when and why it ends. The same for every engine.

Pure Python over the ``Tokenizer`` interface. Lengths are tokens.
"""

from paceline.server.engine.detokenizer import IncrementalDetokenizer, StopChecker
from paceline.server.engine.interface import Tokenizer
from paceline.server.engine.request import FinishReason, Request


class OutputText:
    """The output of a choice.

    Args:
        request: whose stop conditions hold.
        tokenizer: of the model.
        max_tokens: after how many tokens it ends at the latest.

    Attributes:
        stop_ids: tokens that end it, without text of their own.
        finish_reason: set by the token that ends it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        sampling = request.sampling
        eos = frozenset[int]() if sampling.ignore_eos else tokenizer.eos_ids
        self.stop_ids = eos | set(sampling.stop_token_ids)
        self.finish_reason: FinishReason | None = None
        self._max_tokens, self._min_tokens = max_tokens, sampling.min_tokens
        self._count = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues=request.continues_text)
        self._stops = StopChecker(sampling.stop)

    def take(self, token: int) -> str:
        """The text that is final with one more token; none may follow once there is a ``finish_reason``."""
        self._count += 1
        if token in self.stop_ids:
            return self._finish("stop")
        text, hit = self._push(self._detokenizer.push([token]))
        if hit:
            self.finish_reason = "stop"
        elif self._count >= self._max_tokens:
            text += self._finish("length")
        return text

    def _push(self, text: str) -> tuple[str, bool]:
        if self._count < self._min_tokens:
            return text, False
        return self._stops.push(text)

    def _finish(self, reason: FinishReason) -> str:
        """Release what was held back; a stop string completed by it counts as a stop."""
        text, hit = self._push(self._detokenizer.flush())
        self.finish_reason = "stop" if hit else reason
        return text if hit else text + self._stops.flush()
