"""From wire fields to ``SamplingParams`` and ``SpeculationParams``, with the checks that need the model.

Pure functions; every refusal names the field.
"""

import re
from typing import Final

from paceline.server.api.prompts import check_vocabulary
from paceline.server.api.schemas import MAX_STOP_CHARS, GenerationBody, SpeculationBody
from paceline.server.engine.interface import ModelInfo, check_lenience, native_only
from paceline.server.engine.request import SamplingParams, SpeculationParams
from paceline.server.errors import ContextLengthError, InvalidRequestError

_TOKEN_ID: Final = re.compile(r"[0-9]{1,9}")


def check_generation(body: GenerationBody) -> None:
    """Checks between fields that need no model.

    Raises:
        InvalidRequestError: fields that contradict each other or are too large together.
    """
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise InvalidRequestError(
            "'max_tokens' and 'max_completion_tokens' differ; give one of them.", param="max_tokens"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("'stream_options' goes with 'stream': true only.", param="stream_options")
    if sum(map(len, body.stop)) > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"The 'stop' strings hold more than {MAX_STOP_CHARS} characters together.", param="stop"
        )


def sampling_params(
    body: GenerationBody,
    model: ModelInfo,
    prompt_tokens: int,
    *,
    default_max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How to sample after a prompt of ``prompt_tokens`` tokens.

    Args:
        default_max_tokens: output bound if the client gave none; cut to what the context leaves.

    Raises:
        ContextLengthError: the tokens asked for don't fit behind the prompt.
        InvalidRequestError: a token id outside the vocabulary, or min_tokens above max_tokens.
    """
    max_tokens = _max_tokens(body, model, prompt_tokens, default_max_tokens)
    if body.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' ({body.min_tokens}) is above the {max_tokens} tokens that may be generated.",
            param="min_tokens",
        )
    check_vocabulary(body.stop_token_ids, model, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=body.top_k if 0 < body.top_k < model.vocab_size else 0,
        top_p=body.top_p,
        min_p=body.min_p,
        min_tokens=body.min_tokens,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        seed=body.seed,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body, model),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def speculation_params(wish: SpeculationBody | None, model: ModelInfo, *, seeded: bool) -> SpeculationParams:
    """A request's wishes for speculation, checked against what the model can do.

    Raises:
        InvalidRequestError: an unknown draft, speculation where none is configured, or a lenience that the model or
            the seed rules out. (The engine itself bounds the block length.)
    """
    if wish is None:
        return SpeculationParams()
    if model.engine != "native" and wish.draft not in (None, *model.drafts):
        raise native_only("speculation.draft")
    if wish.draft is not None and wish.draft not in model.drafts:
        raise InvalidRequestError(
            f"The model '{model.name}' has no draft of this name; it has: {_listing(model.drafts)}.",
            param="speculation.draft",
            code="unknown_draft",
        )
    asked = wish.enabled or (wish.enabled is None and bool(wish.max_draft_tokens))
    if asked and (wish.draft or model.default_draft) is None:
        raise InvalidRequestError(
            f"The model '{model.name}' does not speculate by itself; name one of its drafts in "
            f"'speculation.draft': {_listing(model.drafts)}.",
            param="speculation.enabled",
        )
    lenience = 1.0 if wish.lenience is None else wish.lenience
    check_lenience(lenience, model, seeded=seeded)
    return SpeculationParams(
        enabled=wish.enabled is not False,
        max_draft_tokens=wish.max_draft_tokens,
        draft=wish.draft,
        lenience=lenience,
    )


def could_speculate(params: SpeculationParams, model: ModelInfo) -> bool:
    """Whether a request under these wishes may use a draft at all."""
    return (
        params.enabled and params.max_draft_tokens != 0 and (params.draft or model.default_draft) is not None
    )


def _max_tokens(body: GenerationBody, model: ModelInfo, prompt_tokens: int, default: int) -> int:
    name, asked = body.token_limit
    room = model.context_length - prompt_tokens
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens} tokens and '{name}' asks for {asked} more, but the context of "
            f"'{model.name}' holds {model.context_length}; shorten the prompt or lower '{name}'.",
            param=name,
            code="context_length_exceeded",
        )
    if asked is None and room == 0:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens} tokens and fills the context of '{model.name}' "
            f"({model.context_length}); shorten the prompt.",
            code="context_length_exceeded",
        )
    return asked if asked is not None else min(default, room)


def _logit_bias(body: GenerationBody, model: ModelInfo) -> dict[int, float]:
    bad = next((key for key in body.logit_bias if not _TOKEN_ID.fullmatch(key)), None)
    if bad is not None:
        raise InvalidRequestError(
            f"'logit_bias' maps token ids to numbers; {bad[:40]!r} is not a token id.", param="logit_bias"
        )
    bias = {int(key): value for key, value in body.logit_bias.items()}
    check_vocabulary(list(bias), model, "logit_bias")
    return bias


def _listing(drafts: tuple[str, ...]) -> str:
    return ", ".join(drafts) or "none"
