"""Choices on the wire: one renderer per endpoint turns a choice's events into its JSON object.

A whole response is the same rendering applied to all events of a choice at once (``events.concatenate``). A
renderer serves one API request: it remembers which choices have begun.
"""

from typing import Any, Protocol

from paceline.server.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from paceline.server.api.prompts import Prompt
from paceline.server.engine.interface import ModelInfo
from paceline.server.engine.request import TokenEvent


class Renderer(Protocol):
    """What ``generate`` needs to know about an endpoint."""

    body_object: str
    chunk_object: str

    def choice(self, prompt: int, index: int, event: TokenEvent, *, whole: bool) -> dict[str, Any]:
        """The JSON of choice ``index`` (over all prompts); ``whole`` if ``event`` is all there will be."""
        ...


class CompletionRenderer:
    """Choices of ``/v1/completions``; with ``echo`` a choice's first event brings its prompt along."""

    body_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: ModelInfo, prompts: list[Prompt], *, echo: bool) -> None:
        self._tokenizer = model.tokenizer
        self._prompts = prompts
        self._echo = echo
        self._offsets: dict[int, TextOffsets] = {}

    def choice(self, prompt: int, index: int, event: TokenEvent, *, whole: bool) -> dict[str, Any]:
        """See ``Renderer``."""
        text, entries = event.text, event.logprobs
        if self._echo and index not in self._offsets:
            text = self._prompt_text(prompt) + text
            if event.prompt_logprobs is not None:
                entries = event.prompt_logprobs + (entries or ())
        offsets = self._offsets.setdefault(index, TextOffsets(self._tokenizer, text))
        logprobs = None if entries is None else completion_logprobs(entries, self._tokenizer, offsets)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def _prompt_text(self, prompt: int) -> str:
        text = self._prompts[prompt].text
        return self._tokenizer.decode(self._prompts[prompt].ids) if text is None else text


class ChatRenderer:
    """Choices of ``/v1/chat/completions``; a choice's first delta carries the role."""

    body_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, model: ModelInfo) -> None:
        self._tokenizer = model.tokenizer
        self._begun: set[int] = set()

    def choice(self, prompt: int, index: int, event: TokenEvent, *, whole: bool) -> dict[str, Any]:
        """See ``Renderer``."""
        first = index not in self._begun
        self._begun.add(index)
        message = {"role": "assistant", "content": event.text} if first else {"content": event.text}
        logprobs = None if event.logprobs is None else chat_logprobs(event.logprobs, self._tokenizer)
        return {
            "index": index,
            "message" if whole else "delta": message,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
