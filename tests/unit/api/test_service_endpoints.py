"""Everything around generation: life cycle, models, keys, limits, request ids, tokenize."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from asgi_client import AsgiClient, assert_openai_error
from fake_engine import BOS_ID, ByteTokenizer, FakeEngine, model_info

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.errors import InvalidRequestError, QueueFullError, UnavailableError
from paceline.server.metrics import Metrics

COMPLETION = {"model": "fake", "prompt": "hi"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
MODEL_PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


def client_for(engine: FakeEngine, **settings: Any) -> AsgiClient:
    return AsgiClient(create_app(engine, ApiSettings(**settings), Metrics()))


@pytest.mark.parametrize("state", ["loading", "stopped", "failed"])
def test_before_and_after_its_life_the_server_says_so(state: Any) -> None:
    client = client_for(FakeEngine(state=state))
    for method, path in (*MODEL_PATHS, ("GET", "/ready")):
        response = client.request(method, path)
        assert_openai_error(response, 503, type="service_unavailable", code=state)
        assert int(response.headers["retry-after"]) >= 1
    assert client.get("/version").status_code == 200
    assert client.get("/metrics").status_code == 200
    assert client.get("/health").status_code == (503 if state == "failed" else 200)


def test_ready(client: AsgiClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json()["version"]


def test_draining(engine: FakeEngine, client: AsgiClient) -> None:
    engine.state = "draining"
    engine.refuse = UnavailableError("draining", code="draining", retry_after_seconds=7)
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", {**CHAT, "stream": True})):
        response = client.post(path, body)
        assert_openai_error(response, 503, code="draining")
        assert response.headers["retry-after"] == "7"
    assert_openai_error(client.get("/ready"), 503, code="draining")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(engine: FakeEngine, client: AsgiClient, stream: bool) -> None:
    engine.refuse = QueueFullError("too many", retry_after_seconds=3)
    response = client.post("/v1/completions", {**COMPLETION, "stream": stream})
    assert_openai_error(response, 429, type="rate_limit_error", code="queue_full")
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_of_a_later_prompt_closes_the_earlier_ones(
    engine: FakeEngine, client: AsgiClient, stream: bool
) -> None:
    engine.refuse, engine.accept_first = InvalidRequestError("no", param="prompt"), 2
    response = client.post("/v1/completions", {**COMPLETION, "prompt": ["a", "b", "c"], "stream": stream})
    assert_openai_error(response, 400, param="prompt")
    assert sorted(engine.closed) == [request.id for request in engine.submitted]
    assert len(engine.closed) == 2


def test_models() -> None:
    client = client_for(FakeEngine(model_info("org/one"), model_info("two")))
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["org/one", "two"]
    card = client.get("/v1/models/org/one").json()
    assert card == listing["data"][0]
    assert card["object"] == "model"
    assert card["max_model_len"] == 512
    assert_openai_error(client.get("/v1/models/three"), 404, code="model_not_found", param="model")
    assert client.post("/v1/completions", {"model": "two", "prompt": "x"}).json()["model"] == "two"
    assert_openai_error(client.post("/tokenize", {"prompt": "x"}), 400, param="model")


def test_unknown_routes_and_methods(client: AsgiClient) -> None:
    for path in ("/", "/v1", "/v2/models", "/v1/completions/", "/admin/drafts", "/docs", "/openapi.json"):
        assert_openai_error(client.get(path), 404, type="invalid_request_error")
    response = client.get("/v1/completions")
    assert_openai_error(response, 405, type="invalid_request_error")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic key-1"}, {"authorization": "Bearer"}],
)
def test_keys_are_asked_for(headers: dict[str, str]) -> None:
    client = client_for(FakeEngine(), api_keys=("key-1", "schlüssel"), admin_keys=("root",))
    for method, path in (*MODEL_PATHS, ("GET", "/nowhere")):
        response = client.request(method, path, headers=headers)
        assert_openai_error(response, 401, type="authentication_error", param=None)
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["key-1", "schlüssel", "root"])
def test_keys_open(key: str) -> None:
    client = client_for(FakeEngine(), api_keys=("key-1", "schlüssel"), admin_keys=("root",))
    headers = {"authorization": f"Bearer {key}".encode()}
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_no_api_keys_no_check() -> None:
    assert client_for(FakeEngine(), admin_keys=("root",)).get("/v1/models").status_code == 200


def test_body_limit_by_declared_length(engine: FakeEngine) -> None:
    client = client_for(engine, max_body_bytes=100)
    assert_openai_error(client.post("/v1/completions", content=b"x" * 101), 413)
    assert_openai_error(client.post("/v1/completions", content=b"x" * 100), 400)


def test_body_limit_while_it_streams(engine: FakeEngine) -> None:
    client = client_for(engine, max_body_bytes=100)
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10
            yield b"x" * 10

    assert_openai_error(client.post("/v1/completions", content=chunks()), 413, code="payload_too_large")
    assert sent < 200  # Refused while it arrived, not collected first.
    sent = 0
    response = client.post("/v1/completions", content=chunks(), headers={"content-length": "10000"})
    assert_openai_error(response, 413)
    assert sent == 0


def test_request_id_is_kept_or_made(client: AsgiClient) -> None:
    for response in (
        client.get("/health", headers={"x-request-id": "abc-123"}),
        client.get("/nowhere", headers={"x-request-id": "abc-123"}),
        client.post("/v1/completions", COMPLETION, headers={"x-request-id": "abc-123"}),
        client.post("/v1/completions", {**COMPLETION, "stream": True}, headers={"x-request-id": "abc-123"}),
    ):
        assert response.headers.get_list("x-request-id") == ["abc-123"]
    for unfit in ("x" * 129, "a b", "é"):
        made = client.get("/health", headers={"x-request-id": unfit.encode()}).headers["x-request-id"]
        assert made.startswith("req_")
    assert client.get("/health").headers["x-request-id"] != client.get("/health").headers["x-request-id"]


def test_tokenize_and_detokenize(client: AsgiClient) -> None:
    assert client.post("/tokenize", {"model": "fake", "prompt": "hi"}).json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [BOS_ID, 104, 105],
    }
    assert client.post("/tokenize", {"prompt": "hi", "add_special_tokens": False}).json()["tokens"] == [
        104,
        105,
    ]
    tokens = client.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert bytes(tokens) == b"<user>hi\n<assistant>"
    tokens = client.post("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": False}).json()[
        "tokens"
    ]
    assert bytes(tokens) == b"<user>hi\n"
    assert client.post("/detokenize", {"model": "fake", "tokens": [256, 104, 105]}).json() == {
        "prompt": "<s>hi"
    }
    assert client.post("/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_long_texts_are_tokenised_off_the_event_loop(engine: FakeEngine) -> None:
    threads: list[str] = []

    class Watched(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread().name)
            return super().encode(text, add_special_tokens=add_special_tokens)

    engine.models = {"fake": model_info(tokenizer=Watched())}
    client = client_for(engine, inline_tokenize_chars=10)
    assert client.post("/v1/completions", {**COMPLETION, "prompt": "x" * 10}).status_code == 200
    assert client.post("/v1/completions", {**COMPLETION, "prompt": ["x" * 6] * 2}).status_code == 200
    assert [name == threading.current_thread().name for name in threads] == [True, False, False]


def test_an_unforeseen_error_is_a_500_in_shape(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.refuse = RuntimeError("secret")
    response = client_for(engine).post("/v1/completions", COMPLETION)
    error = assert_openai_error(response, 500, type="server_error")
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_requests_run_side_by_side(engine: FakeEngine) -> None:
    """A waiting request doesn't hold up another one on the same event loop."""

    async def both() -> list[int]:
        gate = asyncio.Event()
        original = engine.script

        def script(request: Any) -> Any:
            if request is engine.submitted[0]:
                yield gate.wait()
            yield from original(request)

        engine.script = script
        transport = httpx.ASGITransport(app=create_app(engine, ApiSettings(), Metrics()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
            while not engine.submitted:
                await asyncio.sleep(0)
            second = await client.post("/v1/completions", json=COMPLETION)
            assert not first.done()
            gate.set()
            return [(await first).status_code, second.status_code]

    assert asyncio.run(both()) == [200, 200]
