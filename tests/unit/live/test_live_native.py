"""Real uvicorn, real native engine (tiny models), real clients: what a user of the server sees."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from engines import spec
from live_server import serve_in_thread

from paceline.clients.async_client import AsyncPaceline
from paceline.clients.client import Paceline
from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig, ServerConfig
from paceline.server.engine.build import build_engine
from paceline.server.engine.native import NativeEngine
from paceline.server.metrics import Metrics

HI: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@dataclass(frozen=True)
class Live:
    url: str
    engine: NativeEngine


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Callable[..., Any]) -> Iterator[Live]:
    draft = tiny_checkpoint("llama", perturb=0.02)
    config = PacelineConfig(
        server=ServerConfig(max_queued_requests=1000),
        engine=EngineConfig(
            device="cpu", threads=1, kv_cache_gib=4 / 1024, block_size=16, max_batch_tokens=64
        ),
        models=(
            spec(tiny_checkpoint("llama"), "drafted", draft=draft),
            spec(tiny_checkpoint("llama"), "plain"),
            spec(tiny_checkpoint("qwen2"), "other", draft="ngram"),
        ),
    )
    metrics = Metrics()
    engine = build_engine(config, metrics)
    app = create_app(engine, ApiSettings(), metrics)
    with serve_in_thread(app, startup=engine.start, shutdown=engine.stop) as url:
        yield Live(url, engine)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0, timeout=60) as made:
        yield made


def idle(live: Live) -> bool:
    return all(load.running + load.waiting == 0 for load in live.engine.loads().values())


def wait_until_idle(live: Live) -> None:
    deadline = time.monotonic() + 30
    while not idle(live) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert idle(live)
    assert live.engine.kv_usage() == 0


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["drafted", "plain", "other"]


def test_speculation_changes_speed_only(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": HI, "temperature": 0, "max_tokens": 48}
    plain = client.chat.completions.create(model="plain", **asked)
    for model, draft in (("drafted", None), ("drafted", "ngram"), ("plain", "ngram")):
        extra = {"speculation": {"draft": draft, "max_draft_tokens": 3} if draft else {"max_draft_tokens": 3}}
        other = client.chat.completions.create(model=model, extra_body=extra, **asked)
        assert other.choices[0].message.content == plain.choices[0].message.content
        assert other.choices[0].finish_reason == plain.choices[0].finish_reason


def test_seeded_choices_are_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": HI, "seed": 7, "n": 3, "max_tokens": 30, "temperature": 1.1}
    whole = client.chat.completions.create(model="plain", **asked)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="drafted", stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3


def test_completion_logprobs_echo_and_offsets(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="drafted", prompt="Once upon a time", max_tokens=12, logprobs=2, echo=True, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset or [])
    scored = client.completions.create(
        model="drafted", prompt=choice.text, max_tokens=0, logprobs=2, echo=True, temperature=0
    )
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs is not None
    again = scored.choices[0].logprobs.token_logprobs[1:]
    assert again[:4] == pytest.approx(choice.logprobs.token_logprobs[1:5], abs=1e-3)


def test_own_client_exposes_speculation_statistics(live: Live) -> None:
    with Paceline(base_url=live.url + "/v1") as own:
        answer = own.chat.completions.create(
            model="drafted", messages=HI, temperature=0, max_tokens=40, speculation={"max_draft_tokens": 2}
        )
    stats = answer.speculation
    assert stats is not None
    assert stats.num_draft_tokens > 0
    assert stats.mean_acceptance_length is not None
    assert 1 <= stats.mean_acceptance_length <= 3
    assert len(stats.acceptance_histogram) == 3


def test_async_clients_side_by_side(live: Live) -> None:
    async def main() -> None:
        async with AsyncPaceline(base_url=live.url + "/v1", timeout=60) as own:

            async def ask(i: int) -> str:
                model = ("drafted", "plain", "other")[i % 3]
                stream = await own.chat.completions.create(
                    model=model, messages=HI, seed=i, max_tokens=20, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            crowd = await asyncio.gather(*(ask(i) for i in range(12)))
            assert crowd == [await ask(i) for i in range(12)]
            # The same seed on the same weights is the same text, drafted or not.
            assert await ask(0) == crowd[0]

    asyncio.run(main())


def test_two_hundred_clients_hang_up_at_random_moments(live: Live) -> None:
    rng = random.Random(0)

    async def one(http: httpx.AsyncClient, i: int) -> bool:
        body = {
            "model": rng.choice(("drafted", "plain", "other")),
            "prompt": "x" * rng.randint(1, 200),
            "max_tokens": 250,
            "ignore_eos": True,
            "n": rng.choice((1, 1, 2)),
            "stream": rng.random() < 0.7,
        }
        await asyncio.sleep(rng.random() * 2)
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        done, _ = await asyncio.wait([task], timeout=rng.random() * 1.5)
        task.cancel()
        return bool(done)

    async def main() -> list[bool]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(one(http, i) for i in range(200)))

    finished = asyncio.run(main())
    assert finished.count(False) > 100  # most really did hang up in the middle
    wait_until_idle(live)
    answer = httpx.post(
        live.url + "/v1/completions", json={"model": "plain", "prompt": "x", "max_tokens": 3}, timeout=60
    )
    assert answer.status_code == 200


BASE: dict[str, Any] = {"model": "drafted", "prompt": "hi"}
BAD: list[bytes | dict[str, Any]] = [
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b'{"model": "drafted", "prompt": "\xff"}',
    b'{"model": "drafted", "prompt": "hi", "temperature": NaN}',
    b'{"model": "drafted", "prompt": "hi", "temperature": Infinity}',
    {}, {"model": "drafted"}, {"prompt": "hi", "model": "nope"}, {**BASE, "prompt": ""}, {**BASE, "prompt": []},
    {**BASE, "prompt": "x" * 2000}, {**BASE, "prompt": [10**9]}, {**BASE, "prompt": [-1]}, {**BASE, "max_tokens": -1},
    {**BASE, "max_tokens": 10**12}, {**BASE, "max_tokens": "many"}, {**BASE, "temperature": -1},
    {**BASE, "temperature": "hot"}, {**BASE, "top_p": 2}, {**BASE, "n": 0}, {**BASE, "n": 10**6},
    {**BASE, "stop": "x" * 1_000_000}, {**BASE, "stop": [1]}, {**BASE, "seed": 2**80}, {**BASE, "seed": 0.5},
    {**BASE, "logit_bias": {"a": 1}}, {**BASE, "logit_bias": {"5": 1e9}}, {**BASE, "logprobs": 99},
    {**BASE, "min_tokens": -3}, {**BASE, "stop_token_ids": [10**7]}, {**BASE, "top_k": -7},
    {**BASE, "speculation": {"max_draft_tokens": 10**6}}, {**BASE, "speculation": {"draft": "no such"}},
    {**BASE, "response_format": {"type": "json_object"}}, {**BASE, "unheard_of": 1},
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=lambda b: str(b)[:60])
def test_bad_input_is_a_4xx_in_the_openai_shape(live: Live, body: bytes | dict[str, Any]) -> None:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"}
    answer = httpx.post(live.url + "/v1/completions", headers=headers, timeout=60, **content)
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_count_what_happened(live: Live, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="drafted", messages=HI, temperature=0, max_tokens=20)
    wait_until_idle(live)
    text = httpx.get(live.url + "/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    drafted = 'model_name="drafted"'
    assert values[f"vllm:spec_decode_num_draft_tokens_total{{{drafted}}}"] > 0
    accepted = values[f"vllm:spec_decode_num_accepted_tokens_total{{{drafted}}}"]
    assert 0 < accepted < values[f"vllm:spec_decode_num_draft_tokens_total{{{drafted}}}"]
    assert values[f"vllm:generation_tokens_total{{{drafted}}}"] >= 20
    assert values[f"vllm:num_requests_running{{{drafted}}}"] == 0
