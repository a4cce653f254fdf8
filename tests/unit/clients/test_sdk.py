"""The SDK against a scripted server: what goes out, what comes back, and that openai does the rest."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted_server import Call, Reply, ScriptedServer

from paceline.clients.async_client import AsyncPaceline
from paceline.clients.client import Paceline
from paceline.clients.extensions import SpeculationMetrics

STATISTICS = {
    "mean_acceptance_length": 2.5,
    "draft_acceptance_rate": 0.75,
    "acceptance_histogram": [1, 0, 3],
    "num_spec_steps": 4,
    "num_accepted_draft_tokens": 6,
    "num_draft_tokens": 8,
    "num_spec_tokens": 2,
    "a_field_of_a_later_version": 1,
}
PARSED = SpeculationMetrics(2.5, 0.75, (1, 0, 3), 4, 6, 8, 2)
METRICS = {"metrics": {"speculative_decoding": STATISTICS}}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
HEAD = {"id": "x", "created": 1, "model": "m"}


def chat_body(**more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {**HEAD, "object": "chat.completion", "choices": choices, **more}


def chat_chunks() -> list[dict[str, Any]]:
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, "stop"),
    ]
    chunks = [
        {
            **HEAD,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }
        for delta, reason in deltas
    ]
    return [*chunks[:-1], {**chunks[-1], **METRICS}]


def text_body(**more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}]
    return {**HEAD, "object": "text_completion", "choices": choices, **more}


def script(call: Call) -> Reply:
    """Answer like the real server would, with statistics."""
    if call.path == "/v1/models":
        return Reply(
            {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "us"}]}
        )
    if call.body["model"] == "unknown":
        error = {
            "message": "no model 'unknown'",
            "type": "invalid_request_error",
            "param": "model",
            "code": None,
        }
        return Reply({"error": error}, status=404)
    chat = call.path == "/v1/chat/completions"
    if call.body.get("stream"):
        return Reply(events=chat_chunks() if chat else [text_body(), text_body(**METRICS)])
    return Reply(chat_body(**METRICS) if chat else text_body(**METRICS))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(script) as running:
        yield running


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Paceline]:
    with Paceline(base_url=f"{server.url}/v1", max_retries=0) as running:
        yield running


def test_extensions_travel_in_the_body_and_statistics_come_back(
    client: Paceline, server: ScriptedServer
) -> None:
    reply = client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        speculation={"max_draft_tokens": 3, "draft": "ngram"},
        steering={"weights": {"sql": 0.5}},
        extra_body={"top_k": 5},
        temperature=0.2,
    )
    assert server.posts[0].body == {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 0.2,
        "top_k": 5,
        "speculation": {"max_draft_tokens": 3, "draft": "ngram"},
        "steering": {"weights": {"sql": 0.5}},
    }
    assert reply.choices[0].message.content == "Hello"
    assert reply.speculation == PARSED
    assert isinstance(reply, openai.types.chat.ChatCompletion)


def test_completions_take_the_same_fields(client: Paceline, server: ScriptedServer) -> None:
    reply = client.completions.create(
        model="m", prompt="Hi", speculation={"enabled": False}, steering={"alpha": 0}
    )
    assert server.posts[0].body == {
        "model": "m",
        "prompt": "Hi",
        "speculation": {"enabled": False},
        "steering": {"alpha": 0},
    }
    assert reply.choices[0].text == "Hello"
    assert reply.speculation == PARSED


def test_without_extensions_nothing_is_added(client: Paceline, server: ScriptedServer) -> None:
    client.chat.completions.create(model="m", messages=MESSAGES, speculation=None)
    assert server.posts[0].body == {"model": "m", "messages": MESSAGES}


def test_chat_stream_has_statistics_on_the_last_chunk_and_on_the_stream(client: Paceline) -> None:
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, speculation={"lenience": 0.9}
    )
    assert stream.speculation is None
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    assert [chunk.speculation for chunk in chunks] == [None, None, PARSED]
    assert stream.speculation == PARSED


def test_completion_stream(client: Paceline, server: ScriptedServer) -> None:
    with client.completions.create(model="m", prompt="Hi", stream=True, steering={"beta": 1.5}) as stream:
        assert next(stream).choices[0].text == "Hello"
        assert next(stream).speculation == PARSED
    assert stream.speculation == PARSED
    assert server.posts[0].body["steering"] == {"beta": 1.5}


def test_async_client(server: ScriptedServer) -> None:
    async def scenario() -> None:
        async with AsyncPaceline(base_url=f"{server.url}/v1") as client:
            reply = await client.chat.completions.create(
                model="m", messages=MESSAGES, speculation={"enabled": True}
            )
            assert reply.speculation == PARSED
            text = await client.completions.create(model="m", prompt="Hi", steering={"alpha": 2})
            assert text.speculation == PARSED
            stream = await client.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, speculation={"enabled": True}
            )
            assert [chunk.speculation async for chunk in stream] == [None, None, PARSED]
            assert stream.speculation == PARSED
            texts = await client.completions.create(model="m", prompt="Hi", stream=True)
            assert [chunk.speculation async for chunk in texts] == [None, PARSED]

    asyncio.run(scenario())
    fields = [(call.body.get("speculation"), call.body.get("steering")) for call in server.posts]
    assert fields == [
        ({"enabled": True}, None),
        (None, {"alpha": 2}),
        ({"enabled": True}, None),
        (None, None),
    ]


def test_raw_responses_copies_and_other_resources_stay_openai(
    client: Paceline, server: ScriptedServer
) -> None:
    untyped: Any = client.chat.completions.with_raw_response  # keeps openai's own annotations
    raw = untyped.create(model="m", messages=MESSAGES, speculation={"enabled": False})
    parsed = raw.parse()
    assert raw.http_response.status_code == 200
    assert parsed.speculation == PARSED
    copied = client.with_options(timeout=5.0).chat.completions.create(
        model="m", messages=MESSAGES, speculation={"enabled": False}
    )
    assert copied.speculation == PARSED
    assert [call.body["speculation"] for call in server.posts] == [{"enabled": False}] * 2
    assert [model.id for model in client.models.list()] == ["m"]


def test_a_server_without_statistics_gives_none(client: Paceline, server: ScriptedServer) -> None:
    server.script = lambda call: Reply(chat_body())
    assert client.chat.completions.create(model="m", messages=MESSAGES).speculation is None
    server.script = lambda call: Reply(chat_body(metrics={"speculative_decoding": None}))
    assert client.chat.completions.create(model="m", messages=MESSAGES).speculation is None


def test_rates_without_a_step_are_none_and_missing_fields_are_named(
    client: Paceline, server: ScriptedServer
) -> None:
    nothing: dict[str, Any] = STATISTICS | {"mean_acceptance_length": None, "draft_acceptance_rate": None}
    server.script = lambda call: Reply(chat_body(metrics={"speculative_decoding": nothing}))
    found = client.chat.completions.create(model="m", messages=MESSAGES).speculation
    assert found is not None
    assert found.draft_acceptance_rate is None
    partial = {name: value for name, value in STATISTICS.items() if name != "num_spec_steps"}
    server.script = lambda call: Reply(chat_body(metrics={"speculative_decoding": partial}))
    with pytest.raises(ValueError, match="lacks num_spec_steps"):
        _ = client.chat.completions.create(model="m", messages=MESSAGES).speculation


def test_a_field_given_twice_is_refused(client: Paceline, server: ScriptedServer) -> None:
    with pytest.raises(TypeError, match="'steering' is given both"):
        client.completions.create(
            model="m", prompt="Hi", steering={"alpha": 1}, extra_body={"steering": {"alpha": 2}}
        )
    assert server.calls == []


def test_errors_are_openais(client: Paceline) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'unknown'"):
        client.chat.completions.create(model="unknown", messages=MESSAGES, speculation={"enabled": True})


@pytest.mark.parametrize("kind", [Paceline, AsyncPaceline])
def test_address_and_key_come_from_argument_then_environment_then_default(
    kind: type[Paceline] | type[AsyncPaceline], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PACELINE_BASE_URL", "PACELINE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-another-service")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    plain = kind()
    assert (str(plain.base_url), plain.api_key) == ("http://127.0.0.1:8000/v1/", "paceline")
    monkeypatch.setenv("PACELINE_BASE_URL", "http://10.0.0.1:9/v1")
    monkeypatch.setenv("PACELINE_API_KEY", "from-environment")
    named = kind()
    assert (str(named.base_url), named.api_key) == ("http://10.0.0.1:9/v1/", "from-environment")
    given = kind(base_url="http://10.0.0.2/v1", api_key="given")
    assert (str(given.base_url), given.api_key) == ("http://10.0.0.2/v1/", "given")
