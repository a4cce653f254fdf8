"""One choice of a request in vLLM's words, and what vLLM cannot do for a request.

Pure functions. Stop strings, end-of-sequence ids and text are Paceline's business, so that an answer has the same text
whichever engine gave the tokens; vLLM only learns which ids to stop at.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from paceline.server.engine.interface import ModelInfo, check_lenience, native_only
from paceline.server.engine.request import Request
from paceline.server.errors import ContextLengthError, InvalidRequestError


def sampling_arguments(request: Request, choice: int, stop_ids: frozenset[int]) -> Mapping[str, Any]:
    """Keyword arguments of vLLM's ``SamplingParams`` for one choice; ``output_kind`` is for the caller to set.

    Args:
        stop_ids: ids that end the choice, the end-of-sequence ids among them unless they are to be ignored.
    """
    s = request.sampling
    return {
        "max_tokens": max(1, s.max_tokens),  # vLLM scores no prompt without going on for a token
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "min_tokens": min(s.min_tokens, max(1, s.max_tokens)),
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "seed": None if s.seed is None else choice_seed(s.seed, choice),
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "repetition_penalty": s.repetition_penalty,
        "logit_bias": dict(s.logit_bias) or None,
        "logprobs": s.logprobs,
        "prompt_logprobs": s.prompt_logprobs if choice == 0 else None,
        "detokenize": False,
    }


def choice_seed(seed: int, choice: int) -> int:
    """A choice's own seed, 63 bits: neither the next choice's nor the next seed's, and never vLLM's word for none."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big") >> 1


def check_request(
    request: Request, model: ModelInfo, *, greedy_only: bool = False, unseeded: bool = False
) -> None:
    """Raise InvalidRequestError for what can never run.

    Args:
        greedy_only: whether vLLM would sample wrongly (``Speculation.greedy_only``).
        unseeded: whether a seed would not repeat a sampled text (``Speculation.unseeded``).
    """
    needed = len(request.prompt_ids) + max(1, request.sampling.max_tokens)
    if not request.prompt_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if needed > model.context_length:
        raise ContextLengthError(
            f"this model's context is {model.context_length} tokens, but the prompt has {len(request.prompt_ids)} and "
            f"{max(1, request.sampling.max_tokens)} more are needed",
            code="context_length_exceeded",
        )
    if request.steering.strengths or request.steering.prompts:
        raise native_only("steering")
    if greedy_only and request.sampling.temperature > 0:
        raise InvalidRequestError(
            "'temperature' above 0 is not available: this server runs vLLM on a CPU with a draft, where this version "
            "of vLLM samples wrongly unless Paceline is installed there; ask with 'temperature': 0, serve it with "
            "--draft none, or use the native engine.",
            param="temperature",
            code="native_engine_only",
        )
    if unseeded and request.sampling.temperature > 0 and request.sampling.seed is not None:
        raise InvalidRequestError(
            "'seed' is not available above temperature 0: this server runs vLLM with a draft, which draws its tokens "
            "without the seed; leave it out, serve with --draft none or ngram, or use the native engine.",
            param="seed",
            code="native_engine_only",
        )
    _check_speculation(request, model)


def _check_speculation(request: Request, model: ModelInfo) -> None:
    wish = request.speculation
    check_lenience(wish.lenience, model, seeded=request.sampling.seed is not None)
    if wish.draft not in (None, model.default_draft):
        raise native_only("speculation.draft")
    if model.default_draft is None:
        return
    if not wish.enabled:
        raise native_only("speculation.enabled")
    if wish.max_draft_tokens not in (None, model.max_draft_tokens):
        raise native_only("speculation.max_draft_tokens")
    for name in ("min_p", "logit_bias"):
        if getattr(request.sampling, name):
            raise InvalidRequestError(
                f"'{name}' is not available: this server runs vLLM with a draft, which cannot do both; the native "
                "engine can.",
                param=name,
                code="native_engine_only",
            )
