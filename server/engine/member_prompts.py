"""What the members of a steered model read of a request: its prompt, or their own view of it.

The one place that says so, for the API and for who measures. Pure functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.server.decoding.mixture import mixture
from paceline.server.engine.interface import ModelInfo, PromptView

#: Of a model's pairs by name, in place of their own; None switches a pair off.
Strengths = Mapping[str, float | None]
#: What each member reads; none where all read the target's prompt.
Prompts = tuple[tuple[int, ...], ...]


def conversation_prompts(
    messages: Sequence[Mapping[str, Any]], ids: tuple[int, ...], model: ModelInfo, strengths: Strengths
) -> Prompts:
    """What each member reads of a conversation whose prompt for the target is ``ids``.

    Raises:
        InvalidRequestError: a member's template refuses the messages.
    """

    def read(view: PromptView) -> tuple[int, ...]:
        own = messages if view.prompt is None else _with_system(messages, view.prompt)
        return (*(view.template or model.tokenizer).apply_chat_template(own), *_suffix(view, model))

    return _prompts(model, ids, strengths, read)


def text_prompts(text: str | None, ids: tuple[int, ...], model: ModelInfo, strengths: Strengths) -> Prompts:
    """What each member reads of a completion's prompt.

    Args:
        text: None if the client sent ids.
        ids: of the target's prompt.

    Raises:
        InvalidRequestError: a member's template refuses the prompt.
    """

    def read(view: PromptView) -> tuple[int, ...]:
        if view.template is not None:
            own = model.tokenizer.decode(ids) if text is None else text
            content = own if view.prompt is None else view.prompt
            start = view.template.apply_chat_template([{"role": "user", "content": content}])
        elif view.prompt:
            start = model.tokenizer.encode(view.prompt)
        else:
            start = list(ids if view.prompt is None else ids[-1:])
        return (*start, *_suffix(view, model))

    return _prompts(model, ids, strengths, read)


def _prompts(
    model: ModelInfo,
    ids: tuple[int, ...],
    strengths: Strengths,
    read: Callable[[PromptView], tuple[int, ...]],
) -> Prompts:
    """One prompt per member, the target's where the member does not run; none where all read the target's."""
    steering = model.steering
    mixed = mixture(steering.pairs, strengths, len(steering.views) + 1) if steering is not None else None
    if steering is None or mixed is None:
        return ()
    own = {index: view for index, view in enumerate(steering.views, start=1) if not view.is_plain}
    reading = {index: read(view) for index, view in own.items() if index in mixed.members}
    return tuple(reading.get(index, ids) for index in range(1, len(steering.views) + 1)) if reading else ()


def _with_system(messages: Sequence[Mapping[str, Any]], content: str) -> list[Mapping[str, Any]]:
    """A conversation with another system message, or without one if it is empty."""
    rest = [message for message in messages if message["role"] not in ("system", "developer")]
    return [{"role": "system", "content": content}, *rest] if content else rest


def _suffix(view: PromptView, model: ModelInfo) -> list[int]:
    return [] if view.prefix is None else model.tokenizer.encode(view.prefix, add_special_tokens=False)
