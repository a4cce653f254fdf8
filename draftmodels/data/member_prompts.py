"""What the members of a steered model read of a prompt that is known by its tokens only, as training text is.

The same views as in service (``engine.member_prompts``). A member with a template or a system message of its own needs
the conversation; of one user turn it is found again in the tokens.
"""

from collections.abc import Sequence

from paceline.draftmodels.data.templates import user_turn
from paceline.server.engine.interface import ModelInfo, Tokenizer
from paceline.server.engine.member_prompts import Prompts, conversation_prompts, text_prompts
from paceline.server.errors import DataError


def member_prompts(ids: Sequence[int], model: ModelInfo) -> Prompts:
    """One prompt per member at the pairs' own strengths; none where all read ``ids``.

    Raises:
        DataError: a member needs the conversation, but the prompt is not one user turn.
    """
    own, views = tuple(ids), () if model.steering is None else model.steering.views
    if all(view.template is None and view.prompt is None for view in views) or (
        not model.tokenizer.has_chat_template
    ):
        return text_prompts(None, own, model, {})
    return conversation_prompts([{"role": "user", "content": _content(own, model.tokenizer)}], own, model, {})


def _content(ids: tuple[int, ...], tokenizer: Tokenizer) -> str:
    """What the user says in a conversation of one turn that awaits its answer."""
    turn = user_turn(tokenizer, add_generation_prompt=True)
    before, after = len(turn.before), len(turn.after)
    content = tokenizer.decode(ids[before : len(ids) - after])
    if tuple(tokenizer.apply_chat_template([{"role": "user", "content": content}])) != ids:
        raise DataError(
            "a prompt is not a conversation of one user turn, from which alone members with a template or a system "
            "message of their own can be given theirs; leave such prompts out, or have these members read the target's"
        )
    return content
