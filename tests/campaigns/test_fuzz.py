"""Whatever body a client sends, it gets a valid answer or an error in the OpenAI shape, never a 5xx.

Valid bodies are mutated at random, as JSON (values replaced, keys added, dropped) and as bytes, and sent to the
native engine with a tiny model behind a real uvicorn. ``make fuzz`` sends 20,000, the ordinary suite a twentieth,
always the same.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_client import assert_openai_error
from campaign import FULL, size
from engines import spec
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from live_server import serve_in_thread

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig, ServerConfig
from paceline.server.engine.build import build_engine
from paceline.server.engine.native import NativeEngine
from paceline.server.metrics import Metrics

SHARED: dict[str, Any] = {
    "model": "m",
    "max_tokens": 3,
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "n": 2,
    "seed": 7,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {"5": 1.5},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "stop_token_ids": [9],
    "ignore_eos": True,
    "user": "someone",
    "response_format": {"type": "text"},
    "speculation": {"enabled": True, "draft": "ngram", "max_draft_tokens": 2},
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "hi"},
]
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {**SHARED, "prompt": ["hi there", "hello"], "logprobs": 2, "echo": True}),
    ("/v1/completions", {**SHARED, "prompt": [5, 6, 7]}),
    ("/v1/chat/completions", {**SHARED, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}),
    ("/tokenize", {"model": "m", "messages": MESSAGES, "add_generation_prompt": True}),
    ("/detokenize", {"model": "m", "tokens": [5, 6, 7]}),
]
#: Without these a body is invalid, or its answer needlessly long.
NEEDED = {"model", "messages", "prompt", "tokens", "max_tokens"}
NEEDS_IT = {"stream": "stream_options", "logprobs": "top_logprobs"}
#: Fields of every endpoint, unknown ones, and token ids (the keys of ``logit_bias``).
KEYS = sorted({key for _, body in VALID for key in body})
KEYS += ["tools", "steering", "suffix", "äöü", "", "7", "-1", "99999"]

numbers = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        63,
        64,
        129,
        299,
        300,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e308,
        5e-324,
        math.nan,
    ]
)
texts = st.sampled_from(["", "m", "\x00", "\ud800", "x" * 5000, "<|im_start|>", "€😀"]) | st.text(max_size=20)
scalars = st.none() | st.booleans() | numbers | st.integers() | st.floats() | texts
keys = st.sampled_from(KEYS) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@dataclass(frozen=True)
class Live:
    http: httpx.Client
    engine: NativeEngine


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Callable[..., Path]) -> Iterator[Live]:
    config = PacelineConfig(
        server=ServerConfig(max_queued_requests=5000),
        engine=EngineConfig(device="cpu", threads=1, kv_cache_gib=4 / 1024),
        models=(spec(tiny_checkpoint("llama"), context_length=64, draft="ngram"),),
    )
    metrics = Metrics()
    engine = build_engine(config, metrics)
    app = create_app(engine, ApiSettings(), metrics)
    with (
        serve_in_thread(app, startup=engine.start, shutdown=engine.stop) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield Live(http, engine)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: some fields of a valid one, mutated up to three times, perhaps damaged as bytes."""
    path, valid = copy.deepcopy(draw(st.sampled_from(VALID)))
    for key in draw(st.sets(st.sampled_from(sorted(valid)))) - NEEDED:
        valid.pop(key, None)
        valid.pop(NEEDS_IT.get(key, key), None)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        mutate(draw, valid)
    raw = bytearray(json.dumps(valid).encode())
    for _ in range(draw(st.sampled_from([0] * 8 + [1, 3]))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return path, bytes(raw)


def mutate(draw: st.DrawFn, body: dict[str, Any]) -> None:
    """Replace, drop, rename or add one value, anywhere in the body."""
    owner, key = draw(st.sampled_from([(body, None), *sites(body)]))
    action = draw(st.sampled_from(["replace"] * 4 + ["drop", "rename", "add"]))
    if key is None or action == "add":
        key = draw(keys) if isinstance(owner, dict) else slice(0, 0)
        owner[key] = draw(values) if isinstance(owner, dict) else [draw(values)]
    elif action == "replace":
        alike = numbers if isinstance(owner[key], int | float) else values
        owner[key] = draw(st.one_of(alike, alike, values))
    elif action == "drop":
        del owner[key]
    elif isinstance(owner, dict):
        owner[draw(keys)] = owner.pop(key)


def sites(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside, as its owner and its key there."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from sites(node[key])


def check_answer(path: str, response: httpx.Response) -> None:
    """A 200 holds what it should: choices that finished, tokens or text; a stream ends properly."""
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]", response.text
        chunks = [json.loads(event) for event in events]
        assert all("error" not in chunk for chunk in chunks), response.text
        finished = {c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
        assert finished == {c["index"] for chunk in chunks for c in chunk["choices"]}
    elif path.startswith("/v1/"):
        assert all(choice["finish_reason"] in ("stop", "length") for choice in response.json()["choices"])
    else:
        assert {"tokens", "prompt"} & set(response.json())


@settings(
    max_examples=size(20_000),
    derandomize=not FULL,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(bodies())
def test_any_body_gets_an_answer_or_an_openai_error(live: Live, sent: tuple[str, bytes]) -> None:
    path, raw = sent
    response = live.http.post(path, content=raw, headers={"content-type": "application/json"})
    if response.status_code == 200:
        check_answer(path, response)
    else:
        assert 400 <= response.status_code < 500, response.text
        assert_openai_error(response, response.status_code)
    event(f"{response.status_code} {path}")
    assert live.engine.state == "ready"
