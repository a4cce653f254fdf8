"""The one interface that the API, the offline half and the benches use to talk to an engine.

Engines (native here, others behind ``server/backends``) implement ``AsyncEngine``; nothing above this line knows
which one runs. No HTTP, no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from paceline.server.decoding.mixture import Pair
from paceline.server.decoding.policy import Reason
from paceline.server.engine.request import FinishReason, Request, SpeculationStats, TokenEvent
from paceline.server.errors import InvalidRequestError

EngineState = Literal["loading", "ready", "draining", "stopped", "failed"]
#: Why a choice ended; "abort" when the client left.
FinishedReason = FinishReason | Literal["abort", "error"]


class Tokenizer(Protocol):
    """Text to ids and back for one model; safe to call from any thread."""

    vocab_size: int
    eos_ids: frozenset[int]
    sha256: str
    has_chat_template: bool

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; incomplete UTF-8 becomes U+FFFD."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special tokens included (for logprobs)."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one token adds to the text."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Prompt ids of a conversation; raises InvalidRequestError when the template refuses it."""
        ...


@dataclass(frozen=True, slots=True)
class PromptView:
    """How a steering member reads a request's prompt; all None: as the target does.

    Attributes:
        template: whose chat template it uses: conversations are rendered with it, and the text of a completion's prompt
            becomes a user's message.
        prefix: text behind the prompt.
        prompt: text in place of a conversation's system message, or of a completion's prompt. Empty: no system
            message, or only the last token of the prompt.
    """

    template: Tokenizer | None = None
    prefix: str | None = None
    prompt: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the member reads what the target reads."""
        return self.template is None and self.prefix is None and self.prompt is None


@dataclass(frozen=True, slots=True)
class SteeringInfo:
    """A steered model's pairs, and how each member beside the target reads prompts."""

    pairs: tuple[Pair, ...]
    views: tuple[PromptView, ...]


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """What a served model's weights are.

    Attributes:
        format: they run in: "fp32", "bf16", "int8", "mixed" (int8, parts in bf16), or what vLLM calls it.
        pattern: "dense", "unstructured" or n:m such as "2:4".
        sparsity: share of the weights of the blocks' linears that are left out, 0 to 1.
    """

    format: str
    pattern: str = "dense"
    sparsity: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model as clients may know it.

    ``drafts`` are the proposer names a request may choose; ``default_draft`` is None when speculation is off by
    default. ``min_lenience`` is the least that requests may ask for. ``system_fingerprint`` changes when weights,
    formats or engine change. ``weights_keys`` name the weights that run, the target's first: hash, format and kernels.
    ``engine`` is what runs it, ``weights`` what the target's weights are.
    """

    name: str
    created: int
    context_length: int
    vocab_size: int
    tokenizer: Tokenizer
    drafts: tuple[str, ...] = ()
    default_draft: str | None = None
    max_draft_tokens: int = 0
    min_lenience: float = 1.0
    system_fingerprint: str = ""
    weights_keys: tuple[str, ...] = ()
    steering: SteeringInfo | None = None
    engine: Literal["native", "vllm"] = "native"
    weights: WeightsInfo = WeightsInfo("fp32")


def native_only(field: str) -> InvalidRequestError:
    """What a client is told that asks another engine for something that only the native one does."""
    return InvalidRequestError(
        f"'{field}' cannot be honoured: this server runs vLLM, and only the native engine does that; leave it out.",
        param=field,
        code="native_engine_only",
    )


def check_lenience(lenience: float, model: ModelInfo, *, seeded: bool) -> None:
    """Raise InvalidRequestError for a ``speculation.lenience`` that the model or the request's seed rules out."""
    if lenience == 1:
        return
    if model.engine != "native":
        raise native_only("speculation.lenience")
    if lenience < model.min_lenience:
        allowed = "is exact" if model.min_lenience == 1 else f"allows {model.min_lenience:g} at the least"
        raise InvalidRequestError(
            f"'speculation.lenience' {lenience:g} is not allowed: the model '{model.name}' {allowed}; raise the "
            "value, or lower min_lenience in the server's configuration.",
            param="speculation.lenience",
            code="lenience_not_allowed",
        )
    if seeded:
        raise InvalidRequestError(
            "'speculation.lenience' below 1 lets the draft change the text, which 'seed' rules out; leave one out.",
            param="speculation.lenience",
            code="lenience_not_allowed",
        )


def check_strengths(strengths: Mapping[str, float | None], pairs: Sequence[Pair]) -> None:
    """Raise InvalidRequestError for a strength of a pair that there is not, or outside its limits."""
    known = {pair.name: pair for pair in pairs}
    for name, strength in strengths.items():
        if name not in known:
            raise InvalidRequestError(
                f"This model has no steering pair {name!r}; it has: {', '.join(known) or 'none'}.",
                param="steering.weights",
                code="unknown_steering",
            )
        low, high = known[name].limits
        if strength is not None and not low <= strength <= high:
            raise InvalidRequestError(
                f"The {known[name].parameter} of steering pair {name!r} must be from {low:g} to {high:g}, not "
                f"{strength:g}; the server's configuration may widen its limits.",
                param="steering",
                code="steering_out_of_limits",
            )


@dataclass(frozen=True, slots=True)
class Load:
    """What a model's queue looks like right now (for gauges, tests and Retry-After)."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did; recorded by an ``EngineObserver``.

    ``phase_seconds`` has the keys schedule, draft, forward, sample and commit.
    ``accepted_per_block`` and ``drafted_per_block`` have one entry per verified block, same order.
    ``disabled`` has one reason per decoding sequence for which nothing was drafted though the model could have
    (``decoding.policy.Reason``).
    """

    model: str
    phase_seconds: Mapping[str, float]
    prompt_tokens: int
    generated_tokens: int
    drafted_per_block: Sequence[int] = ()
    accepted_per_block: Sequence[int] = ()
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    disabled: Sequence[Reason] = ()


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Timings of one finished choice, seconds; ``steered``: it was not exactly the target's."""

    model: str
    finished_reason: FinishedReason
    queue_seconds: float
    first_token_seconds: float | None
    inter_token_seconds: Sequence[float]
    total_seconds: float
    speculation: SpeculationStats
    steered: bool = False


class EngineObserver(Protocol):
    """Receives statistics on the engine thread; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """One engine step is done."""
        ...

    def on_request(self, stats: RequestStats) -> None:
        """One choice is finished."""
        ...


class EventStream(Protocol):
    """One request's events: an async iterator that can be closed, also before its first event."""

    def __aiter__(self) -> "EventStream":
        """The stream itself."""
        ...

    async def __anext__(self) -> TokenEvent:
        """The next event of any choice; StopAsyncIteration after the last choice's final one."""
        ...

    async def aclose(self) -> None:
        """Stop listening; cancels the request, if it still runs, and frees its blocks within one step."""
        ...


class AsyncEngine(Protocol):
    """Asyncio face of an engine."""

    @property
    def state(self) -> EngineState:
        """Current life-cycle state."""
        ...

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """Served models by name; empty until loaded."""
        ...

    async def start(self) -> None:
        """Load the models and start stepping; returns when ready. Raises UserError if a model cannot load."""
        ...

    def submit(self, request: Request) -> EventStream:
        """Queue a request and iterate over its events until every choice has finished.

        Whoever stops iterating early closes the stream.

        Raises:
            QueueFullError: the waiting queue is at its limit.
            UnavailableError: loading, draining or stopped.
            InvalidRequestError: the request can never run (unknown model or draft, too long).
            EngineError: from the stream, when the engine failed while the request was running.
        """
        ...

    def loads(self) -> Mapping[str, Load]:
        """Running and waiting choices per model."""
        ...

    def kv_usage(self) -> float:
        """Share of the KV blocks in use by running sequences, 0..1 (cached but unused blocks count as free)."""
        ...

    async def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests and wait for running ones; False if the timeout came first."""
        ...

    async def stop(self) -> None:
        """Stop at once; running requests end with UnavailableError."""
        ...
