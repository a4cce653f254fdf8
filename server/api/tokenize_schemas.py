"""Wire types of ``POST /tokenize`` and ``POST /detokenize``."""

from typing import Self

from pydantic import model_validator

from paceline.server.api.chat_schemas import Messages
from paceline.server.api.schemas import WireModel


class TokenizeBody(WireModel):
    """``POST /tokenize``: one of ``prompt`` and ``messages``; chat templates bring their special tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give either 'prompt' or 'messages'")
        if self.prompt is None and self.add_special_tokens:
            raise ValueError(
                "'add_special_tokens' goes with 'prompt'; a chat template adds its own special tokens"
            )
        if self.messages is None and self.add_generation_prompt is not None:
            raise ValueError("'add_generation_prompt' goes with 'messages'")
        return self


class DetokenizeBody(WireModel):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]
