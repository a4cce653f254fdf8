"""Server-sent events and hang-ups, over a real uvicorn."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fake_engine import REPLY, FakeEngine, Scripted, event
from live_server import serve_in_thread

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.engine.request import Request
from paceline.server.errors import EngineError, UnavailableError
from paceline.server.metrics import Metrics

COMPLETION = {"model": "fake", "prompt": "hi"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
PATHS = list(BODIES)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve_in_thread(create_app(engine, ApiSettings(), Metrics())) as base_url:
        yield base_url


def stream(url: str, path: str, **fields: Any) -> list[Any]:
    """The decoded ``data:`` payloads of a stream, ``[DONE]`` as a string."""
    body = {**BODIES[path], "stream": True, **fields}
    with httpx.stream("POST", url + path, json=body, timeout=30) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        text = "".join(response.iter_text())
    events = text.split("\n\n")
    assert events.pop() == ""
    payloads = [one.removeprefix("data: ") for one in events]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def waiting_script(*words: str) -> Callable[[Request], Iterator[Scripted]]:
    """Says the words, then waits for ever."""

    def script(request: Request) -> Iterator[Scripted]:
        for word in words:
            yield event(request, 0, word)
        yield asyncio.Event().wait()

    return script


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; a hang-up travels through the kernel."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def hang_up_after(url: str, path: str, body: dict[str, Any], until: Callable[[socket.socket], None]) -> None:
    """Send a request over a bare socket, wait for ``until``, close."""
    payload = json.dumps(body).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + payload)
        until(connection)


def read_until(marker: bytes) -> Callable[[socket.socket], None]:
    def read(connection: socket.socket) -> None:
        received = b""
        while marker not in received:
            part = connection.recv(65536)
            assert part, received
            received += part

    return read


def test_chat_chunks(url: str) -> None:
    *chunks, done = stream(url, "/v1/chat/completions")
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": REPLY[0]},
        *({"content": word} for word in (*REPLY[1:], "0")),
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert [("metrics" in chunk) for chunk in chunks] == [False, False, False, True]
    assert chunks[-1]["metrics"]["speculative_decoding"]["mean_acceptance_length"] == 2.5


def test_completion_chunks(url: str) -> None:
    *chunks, done = stream(url, "/v1/completions", logprobs=1, echo=True, prompt=[97, 98])
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "ab" + "".join(REPLY) + "0"
    logprobs = [choice["logprobs"] for choice in choices]
    assert logprobs[0]["token_logprobs"][:3] == [None, -1.0, -0.5]
    # Offsets go on across chunks; the ö is one character of two tokens.
    offsets = [offset for part in logprobs for offset in part["text_offset"]]
    assert offsets == [*range(10), 9, *range(10, 16)]


@pytest.mark.parametrize("path", PATHS)
def test_streamed_and_whole_answers_agree(url: str, path: str) -> None:
    fields: dict[str, Any] = {"n": 3, "logprobs": 2 if path == "/v1/completions" else True}
    if path == "/v1/completions":
        fields |= {"prompt": ["p", "q"], "echo": True}
    whole = httpx.post(url + path, json={**BODIES[path], **fields}).json()
    *chunks, _ = stream(url, path, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["metrics"] == whole["metrics"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        if path == "/v1/completions":
            assert "".join(part["text"] for part in parts) == choice["text"]
            for key, value in choice["logprobs"].items():
                assert [item for part in parts for item in part["logprobs"][key]] == value
        else:
            assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
            assert ["role" in part["delta"] for part in parts] == [True, *[False] * (len(parts) - 1)]
            content = [item for part in parts for item in part["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]


@pytest.mark.parametrize("path", PATHS)
def test_include_usage(url: str, path: str) -> None:
    *chunks, last, done = stream(url, path, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert all("metrics" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 15
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert last["metrics"]["speculative_decoding"]["num_draft_tokens"] == 8


@pytest.mark.parametrize("include_usage", [True, False])
def test_continuous_usage(url: str, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    *chunks, done = stream(url, "/v1/completions", stream_options=options, ignore_eos=True, stop=None)
    assert done == "[DONE]"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [5, 12, 13, 15, *([15] if include_usage else [])]


def test_chunks_arrive_as_they_happen(engine: FakeEngine, url: str) -> None:
    engine.script = waiting_script("first")
    with httpx.stream("POST", url + "/v1/completions", json={**COMPLETION, "stream": True}) as response:
        lines = response.iter_lines()
        assert "first" in next(lines)
        assert engine.open


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (EngineError("secret"), "server_error", None),
        (ValueError("secret"), "server_error", None),
        (UnavailableError("stopped", code="stopped"), "service_unavailable", "stopped"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_failure_inside_a_stream_is_an_event(
    engine: FakeEngine,
    url: str,
    path: str,
    error: Exception,
    kind: str,
    code: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.script = lambda request: iter([event(request, 0, "x"), error])
    first, last = stream(url, path)
    assert first["choices"]
    assert set(last) == {"error"}
    assert (last["error"]["type"], last["error"]["code"]) == (kind, code)
    assert "secret" not in json.dumps(last)
    assert ("secret" in caplog.text) == (kind == "server_error")
    eventually(lambda: engine.closed == [engine.submitted[0].id])


def test_an_engine_that_goes_silent_is_a_failure(engine: FakeEngine, url: str) -> None:
    engine.script = lambda request: iter([event(request, 0, "x")])
    assert "error" in stream(url, "/v1/completions")[-1]


@pytest.mark.parametrize("path", PATHS)
def test_hang_up_in_a_stream(engine: FakeEngine, url: str, path: str) -> None:
    engine.script = waiting_script("word")
    hang_up_after(url, path, {**BODIES[path], "stream": True}, read_until(b"word"))
    eventually(lambda: engine.closed == [engine.submitted[0].id])
    assert httpx.get(url + "/health").status_code == 200


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_hang_up_before_the_first_token(engine: FakeEngine, url: str, path: str, streaming: bool) -> None:
    engine.script = waiting_script()
    hang_up_after(
        url, path, {**BODIES[path], "stream": streaming}, lambda _: eventually(lambda: bool(engine.submitted))
    )
    eventually(lambda: engine.closed == [engine.submitted[0].id])


@pytest.mark.parametrize("streaming", [True, False])
def test_hang_up_closes_every_prompt(engine: FakeEngine, url: str, streaming: bool) -> None:
    engine.script = waiting_script("word")
    body = {**COMPLETION, "prompt": ["a", "b", "c"], "n": 2, "stream": streaming}
    hang_up_after(url, "/v1/completions", body, lambda _: eventually(lambda: len(engine.submitted) == 3))
    eventually(lambda: sorted(engine.closed) == [request.id for request in engine.submitted])


def test_hang_up_of_a_client_that_never_reads(engine: FakeEngine, url: str) -> None:
    produced = 0

    def script(request: Request) -> Iterator[Scripted]:
        nonlocal produced
        while True:
            produced += 1
            yield event(request, 0, "x" * 10_000)
            yield asyncio.sleep(0.001)

    engine.script = script
    # By then the socket's buffers are full, and the server hangs in its send.
    hang_up_after(
        url,
        "/v1/completions",
        {**COMPLETION, "stream": True},
        lambda _: eventually(lambda: produced > 1500),
    )
    eventually(lambda: engine.closed == [engine.submitted[0].id])


def test_many_hang_ups_leave_nothing_behind(engine: FakeEngine, url: str) -> None:
    engine.script = waiting_script("word")
    for i in range(30):
        path = PATHS[i % 2]
        until = read_until(b"word") if i % 3 else (lambda _: None)
        hang_up_after(url, path, {**BODIES[path], "stream": True}, until)
    eventually(lambda: not engine.open)
    assert len(engine.closed) == len(engine.submitted)


def test_an_oversized_upload_gets_its_answer(url: str) -> None:
    response = httpx.post(url + "/v1/completions", content=b"x" * (6 * 1024 * 1024))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize("path", PATHS)
def test_the_engine_is_told_who_reads_events_as_they_come(path: str, url: str, engine: FakeEngine) -> None:
    stream(url, path)
    httpx.post(url + path, json=BODIES[path])
    assert [request.streams for request in engine.submitted] == [True, False]
