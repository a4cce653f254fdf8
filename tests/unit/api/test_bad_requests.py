"""Whatever a client sends that can't be honoured is a 4xx in the OpenAI shape that names the field."""

import json
import logging
from typing import Any

import pytest
from asgi_client import AsgiClient, assert_openai_error
from fake_engine import FakeEngine, model_info

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.metrics import Metrics

COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "hi"}
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}

SHARED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e300}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 600}, "max_completion_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": "x" * 1_000_000}, "stop[0]"),
    ({"stop": ["x" * 3000, "y" * 3000]}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": 7}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"bogus": True}}, "stream_options.bogus"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "text", "extra": 1}}, "response_format"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"steering": {"alpha": 1.0}}, "steering"),
    ({"speculation": {"lenience": 0.5}}, "speculation.lenience"),
    ({"speculation": {"lenience": 0}}, "speculation.lenience"),
    ({"speculation": {"draft": "nope"}}, "speculation.draft"),
    ({"speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens"),
    ({"speculation": {"enabled": "no"}}, "speculation.enabled"),
    ({"speculation": {"k": 4}}, "speculation.k"),
    ({"speculation": True}, "speculation"),
    ({"temprature": 1}, "temprature"),
    ({"model": 5}, "model"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "hi"}}, "prompt"),
    ({"prompt": ["hi", 5]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [[1], [2.5]]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["hi"] * 1025}, "prompt"),
    ({"prompt": ["hi"] * 9, "n": 128}, "prompt"),
    ({"prompt": "x" * 600}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": "yes"}, "echo"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x", "mood": "sad"}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"),  # The template refuses it.
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"echo": True}, "echo"),
]
CASES = [
    *(
        (f"/v1/{path}", {**base, **extra}, param)
        for path, base in (("completions", COMPLETION), ("chat/completions", CHAT))
        for extra, param in SHARED
    ),
    *(("/v1/completions", {**COMPLETION, **extra}, param) for extra, param in COMPLETION_ONLY),
    *(("/v1/chat/completions", {**CHAT, **extra}, param) for extra, param in CHAT_ONLY),
    ("/tokenize", {}, None),
    ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, None),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, None),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, None),
    ("/detokenize", {"tokens": [999]}, "tokens"),
    ("/detokenize", {"tokens": "abc"}, "tokens"),
    ("/detokenize", {}, "tokens"),
]
RAW_BODIES = {
    "empty": b"",
    "not JSON": b"model=fake",
    "truncated": b'{"model": "fake", "prompt": "hi"',
    "invalid UTF-8": b'{"model": "fake", "prompt": "\xff\xfe"}',
    "lone surrogate": b'{"model": "fake", "prompt": "\\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "fake", "prompt": "hi"}',
    "UTF-16": '{"model": "fake", "prompt": "hi"}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "null": b"null",
    "nested deeply": b'{"model": "fake", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an endless number": b'{"model": "fake", "prompt": "hi", "seed": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_a_malformed_field_is_named(
    client: AsgiClient, engine: FakeEngine, path: str, body: dict[str, Any], param: str | None
) -> None:
    response = client.post(path, content=json.dumps(body))
    error = assert_openai_error(response, 400, type="invalid_request_error", param=param)
    assert len(error["message"]) < 500
    assert "\n" not in error["message"]
    assert not engine.submitted


@pytest.mark.parametrize("raw", RAW_BODIES.values(), ids=RAW_BODIES)
def test_a_body_that_is_no_json_object_is_refused(client: AsgiClient, raw: bytes) -> None:
    assert_openai_error(client.post("/v1/completions", content=raw), 400, code="invalid_json", param=None)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "frequency_penalty", "repetition_penalty"])
def test_numbers_must_be_finite(client: AsgiClient, literal: str, field: str) -> None:
    raw = f'{{"model": "fake", "prompt": "hi", "{field}": {literal}}}'
    assert_openai_error(client.post("/v1/completions", content=raw), 400, param=field)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_required_fields(client: AsgiClient, missing: str) -> None:
    body = {key: value for key, value in COMPLETION.items() if key != missing}
    error = assert_openai_error(client.post("/v1/completions", body), 400, param=missing)
    assert error["message"] == f"The field '{missing}' is required."


def test_unknown_field_suggests_the_nearest_name(client: AsgiClient) -> None:
    error = assert_openai_error(client.post("/v1/completions", {**COMPLETION, "temprature": 1}), 400)
    assert "'temperature'" in error["message"]


def test_unknown_fields_can_be_allowed_with_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    client = AsgiClient(create_app(engine, ApiSettings(allow_unknown_fields=True), Metrics()))
    messages = [
        {"role": "user", "content": "a", "mood": "sad"},
        {"role": "user", "content": "b", "mood": "x"},
    ]
    body = {"model": "fake", "messages": messages, "shiny": {"new": 1}, "temperature": 0.5}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert client.post("/v1/chat/completions", body).status_code == 200
    warned = [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
    assert len(warned) == 2
    assert any("'shiny'" in text for text in warned)
    assert any("'messages[].mood'" in text for text in warned)
    assert engine.submitted[0].sampling.temperature == 0.5
    # What is known is still checked.
    assert_openai_error(client.post("/v1/chat/completions", {**body, "n": 0}), 400, param="n")


def test_a_prompt_over_the_context_states_both_lengths(client: AsgiClient) -> None:
    error = assert_openai_error(
        client.post("/v1/completions", {"model": "fake", "prompt": [1] * 513}),
        400,
        code="context_length_exceeded",
    )
    assert "513" in error["message"]
    assert "512" in error["message"]


def test_max_tokens_over_the_context_is_refused_not_cut(client: AsgiClient, engine: FakeEngine) -> None:
    body = {"model": "fake", "prompt": [1] * 500, "max_tokens": 13}
    error = assert_openai_error(
        client.post("/v1/completions", body), 400, param="max_tokens", code="context_length_exceeded"
    )
    assert all(number in error["message"] for number in ("500", "13", "512"))
    assert client.post("/v1/completions", {**body, "max_tokens": 12}).status_code == 200
    assert engine.submitted[-1].sampling.max_tokens == 12


def test_a_prompt_that_fills_the_context_can_only_be_scored(client: AsgiClient) -> None:
    body = {"model": "fake", "prompt": [1] * 512}
    assert_openai_error(client.post("/v1/completions", body), 400, code="context_length_exceeded")
    assert client.post("/v1/completions", {**body, "max_tokens": 0}).status_code == 200


def test_unknown_draft_lists_the_known_ones(client: AsgiClient) -> None:
    error = assert_openai_error(
        client.post("/v1/completions", {**COMPLETION, "speculation": {"draft": "x"}}), 400
    )
    assert "tiny-draft, ngram" in error["message"]


def test_speculation_cannot_be_switched_on_where_nothing_drafts() -> None:
    engine = FakeEngine(model_info(drafts=(), default_draft=None, max_draft_tokens=0))
    client = AsgiClient(create_app(engine, ApiSettings(), Metrics()))
    for wish in ({"enabled": True}, {"max_draft_tokens": 4}):
        body = {**COMPLETION, "speculation": wish}
        assert_openai_error(client.post("/v1/completions", body), 400, param="speculation.enabled")
    for wish in ({"enabled": False}, {"max_draft_tokens": 0}, {}):
        assert client.post("/v1/completions", {**COMPLETION, "speculation": wish}).status_code == 200


def test_lenience_needs_a_model_that_allows_it_and_no_seed() -> None:
    engine = FakeEngine(model_info(min_lenience=0.5))
    client = AsgiClient(create_app(engine, ApiSettings(), Metrics()))
    for lenience, extra, words in ((0.4, {}, "0.5 at the least"), (0.5, {"seed": 1}, "'seed'")):
        body = {**COMPLETION, "speculation": {"lenience": lenience}, **extra}
        error = assert_openai_error(client.post("/v1/completions", body), 400, param="speculation.lenience")
        assert words in error["message"]
    allowed = {**COMPLETION, "speculation": {"lenience": 0.5}}
    assert client.post("/v1/completions", allowed).status_code == 200
    assert [request.speculation.lenience for request in engine.submitted] == [0.5]


def test_chat_without_a_template_points_to_completions() -> None:
    info = model_info()
    info.tokenizer.has_chat_template = False
    client = AsgiClient(create_app(FakeEngine(info), ApiSettings(), Metrics()))
    error = assert_openai_error(client.post("/v1/chat/completions", CHAT), 400, param="messages")
    assert "/v1/completions" in error["message"]


def test_unknown_model(client: AsgiClient) -> None:
    for response in (
        client.post("/v1/completions", {**COMPLETION, "model": "gpt-4o"}),
        client.post("/v1/chat/completions", {**CHAT, "model": "gpt-4o"}),
        client.post("/tokenize", {"model": "gpt-4o", "prompt": "x"}),
    ):
        assert_openai_error(response, 404, code="model_not_found", param="model")
