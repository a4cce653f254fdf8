"""One streamed request to an OpenAI-compatible server, timed where its bytes arrive.

Owns the wire: request bodies, server-sent events, token counting, errors. It must not know about load levels
or tables. Token counts come from ``usage`` (running in each chunk, else the total at the end), and only for a
server that sends neither from the number of chunks; each sample says which. Clock: ``perf_counter``, seconds.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from paceline.clients.stats import CountedBy, Sample
from paceline.clients.workload import Endpoint, Prompt

#: Tried in this order until one is not refused: a server may answer 400 to an option that it does not know.
STREAM_OPTIONS: tuple[Mapping[str, bool] | None, ...] = (
    {"include_usage": True, "continuous_usage_stats": True},
    {"include_usage": True},
    None,
)
PATHS: Mapping[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}


class ServerError(Exception):
    """The server refused, failed or broke off; the text is one line.

    Attributes:
        status: HTTP status, or None if the failure came inside a stream or before an answer.
    """

    exit_code = 1

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask and with which fields.

    Attributes:
        base_url: up to and including ``/v1``.
        fields: sent with every request; ``stream`` and ``stream_options`` (see ``negotiate``) come on top.
    """

    base_url: str
    model: str
    endpoint: Endpoint = "chat"
    fields: Mapping[str, Any] = field(default_factory=dict)
    stream_options: Mapping[str, bool] | None = None

    @property
    def url(self) -> str:
        """Full address of the endpoint."""
        return self.base_url + PATHS[self.endpoint]

    def body(self, prompt: Prompt, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Request body; ``overrides`` win over the prompt, the prompt over ``fields``."""
        options = {"stream_options": self.stream_options} if self.stream_options else {}
        fixed = {"model": self.model, "stream": True, **options}
        return {**fixed, **self.fields, **prompt.body(self.endpoint), **overrides}


def new_client(api_key: str | None, *, timeout_s: float, keep_alive: bool = True) -> httpx.AsyncClient:
    """A connection pool without a limit of its own; ``timeout_s`` is the longest silence in a stream."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0),
    )


def error_text(body: object) -> str:
    """The message of an error body in any of the usual shapes."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return " ".join(str(error).split())[:300]


class Recorder:
    """Turns the chunks of one stream into a ``Sample``; no input or output, so it can be fed by hand."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        # (arrival, running token count or None) of every chunk that carried a token
        self._arrivals: list[tuple[float, int | None]] = []
        self._usage: Mapping[str, Any] = {}
        self.finished = False

    def feed(self, now_s: float, chunk: Mapping[str, Any]) -> None:
        """Take one decoded chunk that arrived at ``now_s``.

        Raises:
            ServerError: the chunk reports a failure.
        """
        if chunk.get("error"):
            raise ServerError(f"inside the stream: {error_text(chunk)}")
        before = self._usage.get("completion_tokens") or 0
        usage = chunk.get("usage")
        self._usage = usage or self._usage
        choices = chunk.get("choices") or []
        self.finished = self.finished or any(choice.get("finish_reason") for choice in choices)
        running = usage.get("completion_tokens") if usage else None
        # A token may show no text (part of a character, a special token); the running count still tells.
        if any(map(_has_text, choices)) or (choices and (running or 0) > before):
            self._arrivals.append((now_s, running))

    def sample(self, now_s: float) -> Sample:
        """The finished request's figures."""
        tokens, counted_by = self._chunk_tokens()
        times = [arrival for arrival, _ in self._arrivals]
        gaps = zip(times, times[1:], tokens[1:], strict=False)
        return Sample(
            started_s=self._started_s,
            e2e_s=now_s - self._started_s,
            ttft_s=times[0] - self._started_s if times else None,
            token_gaps=tuple(((late - early) / count, count) for early, late, count in gaps if count > 0),
            output_tokens=self._usage.get("completion_tokens") or round(sum(tokens)),
            prompt_tokens=self._usage.get("prompt_tokens") or 0,
            counted_by=counted_by,
        )

    def _chunk_tokens(self) -> tuple[list[float], CountedBy]:
        """Tokens per arrival, and how they were counted."""
        running = [count for _, count in self._arrivals if count is not None]
        if running and len(running) == len(self._arrivals):
            return [
                late - early for early, late in zip([0, *running], running, strict=False)
            ], "continuous_usage"
        total = self._usage.get("completion_tokens")
        if total is None:
            return [1.0] * len(self._arrivals), "chunks"
        return [total / len(self._arrivals)] * len(self._arrivals) if self._arrivals else [], "usage"


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or choice
    return any(
        delta.get(name) for name in ("content", "text", "reasoning_content", "reasoning", "tool_calls")
    )


async def sse_data(reads: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival time, payload) of each ``data:`` line; everything in one network read arrived at once.

    Splits bytes at line feeds only: text may hold other characters that Python counts as line ends.
    """
    buffer = b""
    async for read in reads:
        now_s = time.perf_counter()
        *lines, buffer = (buffer + read).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now_s, line[5:].strip()


async def _exchange(client: httpx.AsyncClient, url: str, body: Mapping[str, Any], recorder: Recorder) -> None:
    """Send the request and feed the recorder until the stream ends.

    Raises:
        ServerError: refused, failed or broken off.
        httpx.HTTPError: connection trouble.
    """
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raw = await response.aread()
            try:
                text = error_text(json.loads(raw))
            except ValueError:
                text = error_text(raw.decode("utf-8", "replace"))
            raise ServerError(f"HTTP {response.status_code}: {text}", status=response.status_code)
        async for now_s, data in sse_data(response.aiter_bytes()):
            if data == b"[DONE]":
                recorder.finished = True
            elif data:
                recorder.feed(now_s, json.loads(data))
    if not recorder.finished:
        raise ServerError("the stream ended without a finish_reason")


async def request(
    client: httpx.AsyncClient, target: Target, prompt: Prompt, overrides: Mapping[str, Any] | None = None
) -> Sample:
    """One streamed request, measured.

    Raises:
        ServerError: refused, failed, broken off or unreachable.
    """
    body = target.body(prompt, overrides or {})
    started_s = time.perf_counter()
    recorder = Recorder(started_s)
    try:
        await _exchange(client, target.url, body, recorder)
    except httpx.HTTPError as error:
        raise ServerError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    except ValueError as error:
        raise ServerError(f"a chunk is not JSON: {error}") from error
    return recorder.sample(time.perf_counter())


async def measure(client: httpx.AsyncClient, target: Target, prompt: Prompt, **overrides: Any) -> Sample:
    """Like ``request``, with a failure as a sample that says so."""
    started_s = time.perf_counter()
    try:
        return await request(client, target, prompt, overrides)
    except ServerError as error:
        return Sample(started_s=started_s, e2e_s=time.perf_counter() - started_s, error=str(error))


async def negotiate(client: httpx.AsyncClient, target: Target, prompt: Prompt) -> Target:
    """Find the best token counting that the server accepts, with one-token requests.

    Raises:
        ServerError: it refuses them all, or is not there.
    """
    for options in STREAM_OPTIONS:
        candidate = replace(target, stream_options=options)
        try:
            await request(client, candidate, prompt, {"max_tokens": 1})
        except ServerError as error:
            if error.status not in (400, 422) or options is None:
                raise
        else:
            return candidate
    raise AssertionError("unreachable: the last option returns or raises")


async def first_model(client: httpx.AsyncClient, base_url: str) -> str:
    """The first model that the server lists.

    Raises:
        ServerError: none, or no such list.
    """
    try:
        response = await client.get(f"{base_url}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise ServerError(f"{base_url}/models: {type(error).__name__}: {error}".rstrip(": ")) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{base_url}/models lists no model; name one with --model") from error
