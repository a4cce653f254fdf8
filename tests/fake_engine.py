"""A scripted ``AsyncEngine`` for tests of the HTTP face: no model, no threads, every event by hand.

A script gets the request and yields `TokenEvent`s, exceptions to raise, or awaitables to wait for. The default
script answers with the words of ``REPLY``. ``FakeEngine`` records what was submitted and what was closed early.
The tokenizer maps one byte to one id: 0..255 are bytes, 256 begins a text, 257 is the end of a sequence.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from paceline.server.engine.interface import EngineState, EventStream, Load, ModelInfo
from paceline.server.engine.request import Request, SpeculationStats, TokenEvent, TokenLogprob
from paceline.server.errors import InvalidRequestError

BOS_ID = 256
EOS_ID = 257
VOCAB_SIZE = 258
SPECIALS = {BOS_ID: "<s>", EOS_ID: "</s>"}
REPLY = ("Hello", " wörld", "!")

Scripted = TokenEvent | Exception | Awaitable[object]
Script = Callable[[Request], Iterator[Scripted]]


class ByteTokenizer:
    """One id per byte."""

    vocab_size = VOCAB_SIZE
    eos_ids = frozenset({EOS_ID})
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        begin = [BOS_ID] if add_special_tokens and text else []
        if text.startswith(SPECIALS[BOS_ID]):  # Spelled out by the client.
            return [*begin, BOS_ID, *text.removeprefix(SPECIALS[BOS_ID]).encode()]
        return begin + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i < 256 or not skip_special_tokens]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else SPECIALS[token_id].encode()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        if messages[-1]["role"] == "system":
            raise InvalidRequestError("the conversation ends with the system message", param="messages")
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        return list((text + "<assistant>" * add_generation_prompt).encode())


def model_info(name: str = "fake", **overrides: Any) -> ModelInfo:
    """A model that can speculate with a draft and with n-grams."""
    values: dict[str, Any] = {
        "created": 1_700_000_000,
        "context_length": 512,
        "vocab_size": VOCAB_SIZE,
        "tokenizer": ByteTokenizer(),
        "drafts": ("tiny-draft", "ngram"),
        "default_draft": "tiny-draft",
        "max_draft_tokens": 4,
        "system_fingerprint": "fp_fake",
    }
    return ModelInfo(name=name, **{**values, **overrides})


def logprob(token_id: int, value: float | None, top: int) -> TokenLogprob:
    """An entry whose ``top`` most likely tokens are the token itself and the ids after it."""
    if value is None:
        return TokenLogprob(token_id, None)
    return TokenLogprob(token_id, value, tuple(((token_id + i) % VOCAB_SIZE, value - i) for i in range(top)))


def event(request: Request, choice: int, text: str, **fields: Any) -> TokenEvent:
    """An event for ``text``, with log-probabilities if the request asked for them."""
    ids = tuple(text.encode()) + fields.pop("extra_ids", ())
    k = request.sampling.logprobs
    entries = None if k is None else tuple(logprob(i, -0.5, k) for i in ids)
    return TokenEvent(choice, text, ids, logprobs=entries, **fields)


def prompt_entries(request: Request) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities of the prompt's tokens, if asked for."""
    k = request.sampling.prompt_logprobs
    if k is None:
        return None
    return tuple(logprob(i, -1.0 if at else None, k) for at, i in enumerate(request.prompt_ids))


def reply(request: Request) -> Iterator[Scripted]:
    """The default script: every choice says ``REPLY``, the last choice first, all in step.

    Choice ``c`` accepts 2 of 4 draft tokens in one step and 1 of 4 in another, and says its number.
    """
    if request.sampling.max_tokens == 0:
        for choice in range(request.n):
            entries = prompt_entries(request) if choice == 0 else None
            yield event(request, choice, "", prompt_logprobs=entries, finish_reason="length")
        return
    for word in REPLY:
        for choice in reversed(range(request.n)):
            first = word == REPLY[0]
            entries = prompt_entries(request) if first and choice == 0 else None
            yield event(request, choice, word, prompt_logprobs=entries, cached_tokens=3)
    stats = SpeculationStats(2, 8, 3, (0, 1, 1, 0, 0))
    for choice in reversed(range(request.n)):
        yield event(
            request, choice, f"{choice}", extra_ids=(EOS_ID,), finish_reason="stop", speculation=stats
        )


class FakeEngine:
    """See the module's docstring.

    Attributes:
        submitted: every request, in order.
        closed: ids of the requests whose stream was closed, early or after its end.
        finished: ids of the requests whose script ran to its end.
        refuse: raised by ``submit`` once ``accept_first`` requests have been accepted.
    """

    def __init__(self, *models: ModelInfo, script: Script = reply, state: EngineState = "ready") -> None:
        self.models: Mapping[str, ModelInfo] = {model.name: model for model in models or (model_info(),)}
        self.state: EngineState = state
        self.script = script
        self.submitted: list[Request] = []
        self.closed: list[str] = []
        self.finished: list[str] = []
        self.refuse: Exception | None = None
        self.accept_first = 0

    @property
    def open(self) -> set[str]:
        """Requests that are neither finished nor closed."""
        return {request.id for request in self.submitted} - {*self.closed, *self.finished}

    def submit(self, request: Request) -> EventStream:
        if self.refuse is not None and len(self.submitted) >= self.accept_first:
            raise self.refuse
        self.submitted.append(request)
        return _Stream(self, request)

    def loads(self) -> Mapping[str, Load]:
        return {name: Load(running=len(self.open), waiting=2) for name in self.models}

    def kv_usage(self) -> float:
        return 0.25

    async def start(self) -> None:
        self.state = "ready"

    async def drain(self, timeout_seconds: float) -> bool:
        self.state = "draining"
        return True

    async def stop(self) -> None:
        self.state = "stopped"


class _Stream:
    """Plays one script. Not a generator, as the native engine's isn't: closing works before the first event."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._script = engine.script(request)

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> TokenEvent:
        for step in self._script:
            if isinstance(step, TokenEvent):
                return step
            if isinstance(step, Exception):
                raise step
            await step
        self._engine.finished.append(self._request.id)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._engine.closed.append(self._request.id)
