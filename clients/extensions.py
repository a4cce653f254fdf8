"""What Paceline adds to the OpenAI wire format, typed: request fields in, speculation statistics out.

Owns the shapes of ``speculation`` and ``steering`` (request), of ``metrics.speculative_decoding`` (response)
and the response classes that expose it. It must not know how requests are sent: both clients build on it, and
everything else about requests, retries, streams and errors is the ``openai`` package's. Counts are tokens or
steps, rates are shares in 0..1.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, Required, TypeVar

import openai.types
import openai.types.chat
from openai import AsyncStream, NotGiven, Stream, Timeout
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from typing_extensions import TypedDict

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
#: The openai client insists on a key; a server without ``api_keys`` ignores it.
DEFAULT_API_KEY = "paceline"

P = ParamSpec("P")
C = TypeVar("C", bound="ChatCompletionChunk | Completion")


class Speculation(TypedDict, total=False):
    """A request's own wishes for speculation; a key left out means the model's configured value.

    Keys:
        enabled: switch drafting off (or on) for this request.
        max_draft_tokens: longest draft block.
        draft: name of a draft the model was configured with, or ``"ngram"``.
        lenience: 0 < e <= 1; below 1 trades exactness for acceptance.
    """

    enabled: bool
    max_draft_tokens: int
    draft: str
    lenience: float


class SteeringAlpha(TypedDict):
    """Strength of the model's ``proxy`` or ``cfg`` pair; 0 is exactly the base."""

    alpha: float


class SteeringBeta(TypedDict):
    """Strength of the model's ``amplify`` pair."""

    beta: float


class SteeringWeights(TypedDict):
    """One weight per configured steering pair, by name; all zero is exactly the base."""

    weights: Mapping[str, float]


Steering = SteeringAlpha | SteeringBeta | SteeringWeights


class Extensions(TypedDict, total=False):
    """Keyword arguments of ``create`` beyond the OpenAI API's own parameters."""

    speculation: Speculation | None
    steering: Steering | None
    extra_headers: Mapping[str, Any] | None
    extra_query: Mapping[str, object] | None
    extra_body: object | None
    timeout: float | Timeout | NotGiven | None


class ChatParams(chat_params.CompletionCreateParamsNonStreaming, Extensions, total=False):
    """Everything ``chat.completions.create`` takes without ``stream``."""


class ChatStreamParams(chat_params.CompletionCreateParamsStreaming, Extensions):
    """Everything ``chat.completions.create`` takes with ``stream=True``."""


class ChatMaybeStreamParams(chat_params.CompletionCreateParamsBase, Extensions):
    """Everything ``chat.completions.create`` takes when ``stream`` is a variable."""

    stream: Required[bool]


class CompletionParams(text_params.CompletionCreateParamsNonStreaming, Extensions, total=False):
    """Everything ``completions.create`` takes without ``stream``."""


class CompletionStreamParams(text_params.CompletionCreateParamsStreaming, Extensions):
    """Everything ``completions.create`` takes with ``stream=True``."""


class CompletionMaybeStreamParams(text_params.CompletionCreateParamsBase, Extensions):
    """Everything ``completions.create`` takes when ``stream`` is a variable."""

    stream: Required[bool]


@dataclass(frozen=True, slots=True)
class SpeculationMetrics:
    """What speculation did for one request.

    Attributes:
        mean_acceptance_length: tokens committed per verifying forward; None if nothing was verified.
        draft_acceptance_rate: accepted over drafted tokens; None if nothing was drafted.
        acceptance_histogram: entry i counts the verify steps that accepted exactly i draft tokens.
        num_spec_steps: target forwards that verified a draft block.
        num_spec_tokens: longest draft block (K); the histogram has K+1 entries.
    """

    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    acceptance_histogram: tuple[int, ...]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int

    @classmethod
    def from_body(cls, metrics: object) -> "SpeculationMetrics | None":
        """Parse a body's ``metrics`` field; None if it holds no ``speculative_decoding``.

        Raises:
            ValueError: the field is there but lacks a key of the contract.
        """
        fields = metrics.get("speculative_decoding") if isinstance(metrics, Mapping) else None
        if fields is None:
            return None
        missing = [name for name in cls.__slots__ if name not in fields]
        if missing:
            raise ValueError(f"metrics.speculative_decoding lacks {', '.join(missing)}")
        known = {name: fields[name] for name in cls.__slots__}
        return cls(**known | {"acceptance_histogram": tuple(fields["acceptance_histogram"])})


class _WithSpeculation:
    """Mixed into the response classes: statistics from the body's ``metrics`` field."""

    @property
    def speculation(self) -> SpeculationMetrics | None:
        """What speculation did for this request; on a stream, the last chunk that carries text has it."""
        return SpeculationMetrics.from_body(getattr(self, "metrics", None))


class ChatCompletion(_WithSpeculation, openai.types.chat.ChatCompletion):
    """A chat completion with ``speculation`` statistics."""


class ChatCompletionChunk(_WithSpeculation, openai.types.chat.ChatCompletionChunk):
    """A chunk of a chat completion with ``speculation`` statistics (final chunk)."""


class Completion(_WithSpeculation, openai.types.Completion):
    """A text completion, or a chunk of one, with ``speculation`` statistics."""


class SpeculationStream(Stream[C]):
    """The stream of ``openai`` that also keeps the statistics once a chunk has brought them."""

    speculation: SpeculationMetrics | None = None

    def __next__(self) -> C:
        chunk = super().__next__()
        self.speculation = chunk.speculation or self.speculation
        return chunk

    def __iter__(self) -> Iterator[C]:
        return self


class AsyncSpeculationStream(AsyncStream[C]):
    """The asynchronous stream of ``openai`` that also keeps the statistics."""

    speculation: SpeculationMetrics | None = None

    async def __anext__(self) -> C:
        chunk = await super().__anext__()
        self.speculation = chunk.speculation or self.speculation
        return chunk

    # The base class says ``async def`` with ``yield``, which to its callers is this signature.
    def __aiter__(self) -> AsyncIterator[C]:
        return self


#: Class that openai parses a reply into -> ours; anything not listed stays as it is.
REPLY_CLASSES: Mapping[object, Any] = {
    openai.types.chat.ChatCompletion: ChatCompletion,
    openai.types.Completion: Completion,
    Stream[openai.types.chat.ChatCompletionChunk]: SpeculationStream[ChatCompletionChunk],
    Stream[openai.types.Completion]: SpeculationStream[Completion],
    AsyncStream[openai.types.chat.ChatCompletionChunk]: AsyncSpeculationStream[ChatCompletionChunk],
    AsyncStream[openai.types.Completion]: AsyncSpeculationStream[Completion],
}


def typed_reply(options: dict[str, Any]) -> dict[str, Any]:
    """``post`` options with ``cast_to`` and ``stream_cls`` exchanged for the classes of this module."""
    swapped = {
        name: REPLY_CLASSES.get(options[name]) for name in ("cast_to", "stream_cls") if name in options
    }
    return options | {name: kind for name, kind in swapped.items() if kind is not None}


def with_extensions(params: Mapping[str, Any]) -> dict[str, Any]:
    """Move ``speculation`` and ``steering`` into ``extra_body``, where openai sends fields it does not know.

    Raises:
        TypeError: a field is given both as a keyword argument and in ``extra_body``.
    """
    fields = {name: params[name] for name in ("speculation", "steering") if params.get(name) is not None}
    rest = {name: value for name, value in params.items() if name not in ("speculation", "steering")}
    if not fields:
        return rest
    body = rest.get("extra_body") or {}
    for name in fields.keys() & body.keys():
        raise TypeError(f"{name!r} is given both as an argument and in extra_body; give it once")
    return rest | {"extra_body": {**body, **fields}}


def local_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Client options with ``base_url`` and ``api_key`` filled in: argument, then environment, then local.

    ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL`` are never read: a key for another service must not travel here.
    """
    chosen = dict(options)
    if isinstance(chosen.get("base_url"), NotGiven | None):
        chosen["base_url"] = os.environ.get("PACELINE_BASE_URL") or DEFAULT_BASE_URL
    if chosen.get("api_key") is None:
        chosen["api_key"] = os.environ.get("PACELINE_API_KEY") or DEFAULT_API_KEY
    return chosen


def same_signature(_model: Callable[P, None]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Give a function that only forwards its arguments the static signature of the one it forwards to."""
    return lambda function: function
