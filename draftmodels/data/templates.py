"""What a chat template puts around the user's words, found out by rendering it: templates are programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from paceline.server.engine.interface import Tokenizer

#: Two contents that share neither their first nor their last token.
_PROBES = ("A", "7")


@dataclass(frozen=True, slots=True)
class UserTurn:
    """Ids that stand before and after the user's content in a conversation of one user turn, no answer begun
    unless asked for."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def user_turn(tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> UserTurn:
    """The user's turn of a tokenizer's chat template, a default system prompt included.

    Args:
        add_generation_prompt: count what opens the assistant's answer to what follows the content.

    Raises:
        InvalidRequestError: there is no template, or it refuses a plain user message.
    """
    first, second = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": word}], add_generation_prompt=add_generation_prompt
        )
        for word in _PROBES
    )
    return UserTurn(_common(first, second), tuple(reversed(_common(first[::-1], second[::-1]))))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id that ends the user's turn, and the assistant's: the first one after the content. None without one."""
    if tokenizer.has_chat_template:
        after = user_turn(tokenizer).after
        return after[0] if after else None
    return None


def end_of_answer(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What to append to an answer's text: the end-of-turn id where that ends a generation, else the end-of-sequence id,
    if there is any."""
    turn = end_of_turn(tokenizer)
    if turn in tokenizer.eos_ids:
        return (turn,)
    return (min(tokenizer.eos_ids),) if tokenizer.eos_ids else ()


def _common(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
