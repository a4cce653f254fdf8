"""Prompts that the target writes itself: free of other people's data, and of the kind it was tuned on.

An instruct model that is given what its chat template puts before a user's words goes on with such words (Magpie,
arXiv:2406.08464). They are sampled at temperature 1 until the end-of-turn token, then put through the template as any
user's would be.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.data.seeds import derive_seed
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.templates import user_turn
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
CATEGORY = "self"
#: Texts that are sampled at a time, and how many more than are missing: some are filtered out.
_LEAST_SAMPLED, _SURPLUS = 32, 1.1
#: If fewer than one in this many sampled texts can be used, the target is no model that writes prompts.
_WORST_YIELD = 20


class Generator(Protocol):
    """What is needed of ``local_engine.LocalEngine``."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        stop_token_ids: Sequence[int] = (),
    ) -> list[TokenSequence]:
        """See ``LocalEngine.generate``."""
        ...


def self_prompts(
    target: Generator,
    count: int,
    *,
    seed: int,
    max_prompt_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prompt]:
    """Let the target write ``count`` different prompts; the same ones for the same seed.

    Args:
        max_prompt_tokens: longest prompt with everything that the template adds; longer ones are left out.
        progress: told (found, count) now and then.

    Raises:
        ConfigError: the target has no chat template.
        DataError: what it writes is of no use: empty, endless or always the same.
    """
    tokenizer = target.tokenizer
    if not tokenizer.has_chat_template:
        raise ConfigError("prompts 'self' need a target with a chat template; name a file of prompts instead")
    turn = user_turn(tokenizer)
    stops = frozenset((*turn.after[:1], *tokenizer.eos_ids))
    room = max_prompt_tokens - len(turn.before)
    if room < 2:
        raise ConfigError(
            f"max_prompt_tokens {max_prompt_tokens} leaves no room after the template's own tokens"
        )
    found: dict[str, Prompt] = {}
    sampled = 0
    while len(found) < count:
        wanted = max(_LEAST_SAMPLED, int(_SURPLUS * (count - len(found))))
        written = target.generate(
            [turn.before] * wanted,
            temperature=1.0,
            max_tokens=room,
            seed=derive_seed(seed, "self prompts", sampled),
            stop_token_ids=sorted(stops),
        )
        sampled += wanted
        for sequence in written:
            _take(sequence, stops, tokenizer, max_prompt_tokens, found)
        if progress is not None:
            progress(min(len(found), count), count)
        if len(found) < count and len(found) * _WORST_YIELD < sampled:
            raise DataError(
                f"the target wrote {len(found)} usable prompts in {sampled} attempts: it does not seem to be tuned "
                "on conversations; name a file of prompts instead"
            )
    _log.info("%d prompts of the target's own, from %d sampled texts", count, sampled)
    return list(found.values())[:count]


def _take(
    sequence: TokenSequence,
    stops: frozenset[int],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    found: dict[str, Prompt],
) -> None:
    """Keep a sampled text, once, if it came to its end and is neither empty nor too long."""
    if not sequence.answer or sequence.answer[-1] not in stops:
        return
    text = tokenizer.decode(sequence.answer[:-1]).strip()
    if not text:
        return
    tokens = tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
    if len(tokens) <= max_prompt_tokens:
        found[text] = Prompt(tokens, category=CATEGORY)
