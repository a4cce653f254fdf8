"""From a validated body to a ``Job``: the engine requests of one API call and how its answer is to look.

The place where wire words become the engine's; after it nothing looks at the body again.
"""

import time
from dataclasses import dataclass
from uuid import uuid4

from paceline.server.api.chat_schemas import ChatBody, template_messages
from paceline.server.api.prompts import Prompt, chat_prompt, completion_prompts, with_members
from paceline.server.api.refusals import check_refusals
from paceline.server.api.render import ChatRenderer, CompletionRenderer, Renderer
from paceline.server.api.sampling import (
    check_generation,
    could_speculate,
    sampling_params,
    speculation_params,
)
from paceline.server.api.schemas import CompletionBody, GenerationBody, StreamOptions
from paceline.server.api.settings import ApiSettings
from paceline.server.api.steering import strengths_of
from paceline.server.engine.interface import ModelInfo
from paceline.server.engine.member_prompts import Strengths, conversation_prompts, text_prompts
from paceline.server.engine.request import Request, SamplingParams, SteeringParams
from paceline.server.errors import InvalidRequestError

COMPLETION_DEFAULT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One generating API call.

    Attributes:
        requests: one engine request per prompt, each with the same number of choices.
        reports_speculation: the response carries ``metrics.speculative_decoding``.
    """

    id: str
    created: int
    model: ModelInfo
    requests: tuple[Request, ...]
    renderer: Renderer
    stream: bool
    stream_options: StreamOptions
    reports_speculation: bool

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the prompts' log-probabilities are part of the answer."""
        return self.requests[0].sampling.prompt_logprobs is not None

    def index(self, prompt: int, choice: int) -> int:
        """Index of a choice over all prompts."""
        return prompt * self.requests[0].n + choice


async def completion_job(body: CompletionBody, model: ModelInfo, settings: ApiSettings) -> Job:
    """The job of a completion request.

    Raises:
        InvalidRequestError: a field that is out of range for this model or cannot be honoured.
    """
    check_refusals(body)
    check_generation(body)
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequestError(
            "'best_of' other than 'n' is not supported; every choice is returned.", param="best_of"
        )
    prompts = await completion_prompts(
        body.prompt,
        model,
        max_prompts=settings.max_choices // body.n,
        inline_chars=settings.inline_tokenize_chars,
    )
    strengths, inline = strengths_of(body.steering, model), settings.inline_tokenize_chars
    prompts = [
        await with_members(
            prompt,
            lambda prompt: text_prompts(prompt.text, prompt.ids, model, strengths),
            len(prompt.text or ""),
            inline,
        )
        for prompt in prompts
    ]
    sampling = [
        sampling_params(
            body,
            model,
            prompt.longest,
            default_max_tokens=COMPLETION_DEFAULT_TOKENS,
            logprobs=_bounded(body.logprobs, model),
            prompt_logprobs=_bounded(body.logprobs, model) if body.echo else None,
        )
        for prompt in prompts
    ]
    renderer = CompletionRenderer(model, prompts, echo=body.echo)
    return _job(body, model, "cmpl", prompts, sampling, renderer, strengths)


async def chat_job(body: ChatBody, model: ModelInfo, settings: ApiSettings) -> Job:
    """The job of a chat completion request.

    Raises:
        InvalidRequestError: a field that is out of range for this model or cannot be honoured.
    """
    check_refusals(body)
    check_generation(body)
    limit_name, limit = body.token_limit
    if limit == 0:
        raise InvalidRequestError(
            f"'{limit_name}' must be at least 1 for a chat completion.", param=limit_name
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    strengths, inline = strengths_of(body.steering, model), settings.inline_tokenize_chars
    prompt = await chat_prompt(body.messages, model, inline_chars=inline)
    messages = template_messages(body.messages)
    prompt = await with_members(
        prompt,
        lambda prompt: conversation_prompts(messages, prompt.ids, model, strengths),
        sum(len(message["content"]) for message in messages),
        inline,
    )
    sampling = sampling_params(
        body,
        model,
        prompt.longest,
        default_max_tokens=model.context_length,
        logprobs=_bounded(body.top_logprobs or 0, model) if body.logprobs else None,
    )
    return _job(body, model, "chatcmpl", [prompt], [sampling], ChatRenderer(model), strengths)


def _job(
    body: GenerationBody,
    model: ModelInfo,
    prefix: str,
    prompts: list[Prompt],
    sampling: list[SamplingParams],
    renderer: Renderer,
    strengths: Strengths,
) -> Job:
    job_id = f"{prefix}-{uuid4().hex}"
    speculation = speculation_params(body.speculation, model, seeded=body.seed is not None)
    requests = tuple(
        Request(
            f"{job_id}-{i}",
            model.name,
            prompt.ids,
            params,
            speculation,
            body.n,
            prefix == "cmpl",
            SteeringParams(strengths, prompt.members),
            body.stream,
        )
        for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
    )
    return Job(
        id=job_id,
        created=int(time.time()),
        model=model,
        requests=requests,
        renderer=renderer,
        stream=body.stream,
        stream_options=body.stream_options or StreamOptions(),
        reports_speculation=could_speculate(speculation, model),
    )


def _bounded(logprobs: int | None, model: ModelInfo) -> int | None:
    """No more alternatives than there are tokens."""
    return None if logprobs is None else min(logprobs, model.vocab_size)
