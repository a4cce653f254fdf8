"""From the wire's ``steering`` object and a prompt to ``SteeringParams``: strengths by pair, and member prompts.

Pure functions; every refusal names the field.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.server.api.schemas import SteeringBody
from paceline.server.decoding.mixture import mixture
from paceline.server.engine.interface import ModelInfo, PromptView, check_strengths
from paceline.server.errors import InvalidRequestError

Strengths = Mapping[str, float | None]
#: What each member reads; none where all read the target's prompt.
Prompts = tuple[tuple[int, ...], ...]


def strengths_of(wish: SteeringBody | None, model: ModelInfo) -> Strengths:
    """What a request asks for, by pair; None switches a pair off.

    Raises:
        InvalidRequestError: not exactly one of the fields, no such pair, an ambiguous one, or a strength outside its
            limits.
    """
    if wish is None:
        return {}
    given = {name: value for name, value in (("alpha", wish.alpha), ("beta", wish.beta)) if value is not None}
    if len(given) + (wish.weights is not None) != 1:
        raise _bad("'steering' takes exactly one of 'alpha', 'beta' and 'weights'.")
    if model.steering is None:
        raise _bad(f"The model '{model.name}' is not steered; leave 'steering' out or ask for another model.")
    if wish.weights is not None:
        wished = {name: value or None for name, value in wish.weights.items()}
    else:
        parameter, value = next(iter(given.items()))
        wished = {_only_pair(parameter, model): None if parameter == "alpha" and value == 0 else value}
    check_strengths(wished, model.steering.pairs)
    return wished


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


def _only_pair(parameter: str, model: ModelInfo) -> str:
    """The one pair whose strength has this name."""
    assert model.steering is not None
    names = [pair.name for pair in model.steering.pairs if pair.parameter == parameter]
    if len(names) == 1:
        return names[0]
    what = f"several pairs with {parameter}" if names else f"no pair with {parameter}"
    known = ", ".join(pair.name for pair in model.steering.pairs)
    raise _bad(f"The model '{model.name}' has {what}; name one in 'steering.weights': {known}.", parameter)


def _bad(message: str, field: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(message, param="steering" if field is None else f"steering.{field}")
