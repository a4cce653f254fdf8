"""Whole answers of /v1/chat/completions: messages in, message out."""

from typing import Any

import pytest
from asgi_client import AsgiClient
from fake_engine import REPLY, FakeEngine

TEXT = "".join(REPLY) + "0"
HI = [{"role": "user", "content": "hi"}]


def chat(client: AsgiClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", {"model": "fake", "messages": HI, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def prompt_text(engine: FakeEngine) -> str:
    return bytes(engine.submitted[-1].prompt_ids).decode()


def test_the_whole_shape(client: AsgiClient) -> None:
    body = chat(client)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"] == "fp_fake"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["prompt_tokens"] == len("<user>hi\n<assistant>")
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 2


def test_max_tokens_defaults_to_the_rest_of_the_context(client: AsgiClient, engine: FakeEngine) -> None:
    chat(client)
    request = engine.submitted[0]
    assert request.sampling.max_tokens == 512 - len(request.prompt_ids)


def test_roles_and_text_parts(client: AsgiClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "ann",
        },
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "annotations": []},
        {"role": "tool", "content": "d", "tool_call_id": "t1"},
        {"role": "user", "content": "", "type": "text"},
    ]
    chat(client, messages=messages, tools=[], tool_choice="none", parallel_tool_calls=True)
    expected = "<system>be brief\n<user>a\nb\n<assistant>c\n<tool>d\n<user>\n<assistant>"
    assert prompt_text(engine) == expected


def test_logprobs(client: AsgiClient, engine: FakeEngine) -> None:
    content = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert engine.submitted[0].sampling.logprobs == 2
    assert len(content) == len(TEXT.encode()) + 1
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == TEXT
    assert content[-1]["token"] == "</s>"
    assert engine.submitted[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "expected"), [({"logprobs": True}, 0), ({"logprobs": False}, None), ({}, None)]
)
def test_logprobs_switch(
    client: AsgiClient, engine: FakeEngine, fields: dict[str, Any], expected: int | None
) -> None:
    logprobs = chat(client, **fields)["choices"][0]["logprobs"]
    assert engine.submitted[0].sampling.logprobs == expected
    assert (logprobs is None) == (expected is None)
    assert logprobs is None or logprobs["content"][0]["top_logprobs"] == []


def test_n_choices(client: AsgiClient) -> None:
    body = chat(client, n=3)
    contents = [(choice["index"], choice["message"]["content"]) for choice in body["choices"]]
    assert contents == [(i, "".join(REPLY) + str(i)) for i in range(3)]
