"""From the prompt of a request to token ids: text, ids or conversations, checked against the vocabulary.

Long texts are tokenised in a worker thread, so that one client's prompt does not hold up everyone's streams.
Knows the tokenizer and nothing of sampling or queues.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from paceline.server.api.chat_schemas import ChatMessage, template_messages
from paceline.server.engine.interface import ModelInfo
from paceline.server.errors import ContextLengthError, InvalidRequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the client wrote, None if it sent ids.
        members: what the members of a steered model read, one prompt each; none where all read ``ids``.
    """

    ids: tuple[int, ...]
    text: str | None = None
    members: tuple[tuple[int, ...], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt among the target's and the members'."""
        return max(map(len, (self.ids, *self.members)))


async def completion_prompts(
    prompt: Any, model: ModelInfo, *, max_prompts: int, inline_chars: int
) -> list[Prompt]:
    """The prompts of a completion request: a string, strings, ids or lists of ids.

    Raises:
        InvalidRequestError: an empty or malformed prompt, too many of them, or an id outside the vocabulary.
        ContextLengthError: a prompt alone is longer than the model's context.
    """
    items = _listed_prompts(prompt)
    if len(items) > max_prompts:
        raise _bad(f"{len(items)} prompts in one request are too many; send at most {max_prompts}.")
    texts = [item for item in items if isinstance(item, str)]
    encoded = iter(await maybe_in_thread(lambda: _encode(texts, model), sum(map(len, texts)), inline_chars))
    return [
        _checked(Prompt(next(encoded), item), model) if isinstance(item, str) else _checked_ids(item, model)
        for item in items
    ]


async def with_members(
    prompt: Prompt, read: Callable[[Prompt], tuple[tuple[int, ...], ...]], size_chars: int, inline_chars: int
) -> Prompt:
    """A prompt with what the members of a steered model read instead, which ``read`` finds.

    Raises:
        InvalidRequestError: a member's chat template refuses it.
    """
    return replace(prompt, members=await maybe_in_thread(lambda: read(prompt), size_chars, inline_chars))


async def chat_prompt(messages: Sequence[ChatMessage], model: ModelInfo, *, inline_chars: int) -> Prompt:
    """The prompt of a conversation, ready for the assistant's answer.

    Raises:
        InvalidRequestError: the model has no chat template, or the template refuses the messages.
        ContextLengthError: the conversation alone is longer than the model's context.
    """
    ids = await conversation_ids(messages, model, inline_chars=inline_chars)
    return _checked(Prompt(ids), model, param="messages")


async def conversation_ids(
    messages: Sequence[ChatMessage],
    model: ModelInfo,
    *,
    inline_chars: int,
    add_generation_prompt: bool = True,
) -> tuple[int, ...]:
    """Token ids of a conversation under the model's chat template; of any length.

    Raises:
        InvalidRequestError: the model has no chat template, or the template refuses the messages.
    """
    if not model.tokenizer.has_chat_template:
        raise InvalidRequestError(
            f"The model '{model.name}' has no chat template; use /v1/completions with a prompt.",
            param="messages",
        )
    plain = template_messages(messages)
    return await maybe_in_thread(
        lambda: tuple(
            model.tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt)
        ),
        sum(len(message["content"]) for message in plain),
        inline_chars,
    )


async def text_ids(
    text: str, model: ModelInfo, *, inline_chars: int, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text of any length."""
    return await maybe_in_thread(
        lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens), len(text), inline_chars
    )


def check_vocabulary(ids: Sequence[int], model: ModelInfo, param: str) -> None:
    """Raise InvalidRequestError if an id is outside the model's vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= model.vocab_size):
        raise InvalidRequestError(
            f"'{param}' holds a token id outside the vocabulary of '{model.name}' "
            f"(0 to {model.vocab_size - 1}).",
            param=param,
        )


async def maybe_in_thread(work: Callable[[], T], size_chars: int, inline_chars: int) -> T:
    """The result of work on a text of ``size_chars``, done in a worker thread if that is more than ``inline_chars``."""
    return work() if size_chars <= inline_chars else await asyncio.to_thread(work)


def _encode(texts: Sequence[str], model: ModelInfo) -> list[tuple[int, ...]]:
    return [tuple(model.tokenizer.encode(text)) for text in texts]


def _listed_prompts(prompt: Any) -> list[str | list[Any]]:
    """The four shapes as one list of strings and id lists."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _bad(
            "'prompt' must be a string, a list of strings, a list of token ids or a list of such lists."
        )
    if not prompt:
        raise _bad("'prompt' is empty; give at least one token.")
    if all(type(item) is int for item in prompt):
        return [prompt]
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return prompt
    raise _bad("'prompt' must hold strings only, token ids only or lists of token ids only.")


def _checked_ids(ids: list[Any], model: ModelInfo) -> Prompt:
    if not all(type(item) is int for item in ids):
        raise _bad("'prompt' must hold strings only, token ids only or lists of token ids only.")
    prompt = _checked(Prompt(tuple(ids)), model)
    check_vocabulary(ids, model, "prompt")
    return prompt


def _checked(prompt: Prompt, model: ModelInfo, param: str = "prompt") -> Prompt:
    if not prompt.ids:
        raise InvalidRequestError(f"'{param}' is empty; give at least one token.", param=param)
    if len(prompt.ids) > model.context_length:
        raise ContextLengthError(
            f"The prompt has {len(prompt.ids)} tokens, but the context of '{model.name}' holds "
            f"{model.context_length}; shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    return prompt


def _bad(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="prompt")
