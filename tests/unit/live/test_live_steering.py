"""Steered models over HTTP: a crowd of clients with strengths of their own, of which some hang up."""

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import serve_in_thread
from steered import pair, steered_spec

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig, ServerConfig
from paceline.server.engine.build import build_engine
from paceline.server.engine.native import NativeEngine
from paceline.server.metrics import Metrics

CROWD = 100
WORDS = ["sea", "stone", "two", "three", "here", "at once", "the", "ship", "is it", "on"]


@dataclass(frozen=True)
class Live:
    url: str
    engine: NativeEngine

    def wait_until_idle(self) -> None:
        """Until nothing runs and no block is held; a leak fails here."""
        deadline = time.monotonic() + 30
        while any(load.running + load.waiting for load in self.engine.loads().values()):
            assert time.monotonic() < deadline, self.engine.loads()
            time.sleep(0.02)
        assert self.engine.kv_usage() == 0

    def preemptions(self) -> float:
        page = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(r"^vllm:num_preemptions_total\{.*\} (.+)$", page, re.MULTILINE)))


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Callable[..., Path]) -> Iterator[Live]:
    """Two steered models, one drafted for by its expert, and one without pairs; KV memory for a few sequences."""
    target, other = tiny_checkpoint("llama"), tiny_checkpoint("qwen3", seed=8, num_hidden_layers=1)
    expert, anti = (tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, perturb=p) for p in (0.0, 0.4))
    own = pair("p", anti, expert, alpha=1.0)
    myself = pair("q", "self", mode="cfg", anti_prompt="x")
    config = PacelineConfig(
        server=ServerConfig(max_queued_requests=1000),
        engine=EngineConfig(
            device="cpu", threads=1, kv_cache_gib=0.12 / 1024, block_size=16, max_batch_tokens=64
        ),
        models=(
            steered_spec(target, own, name="proxy", draft="expert", max_draft_tokens=3),
            steered_spec(other, myself, own, name="both", draft="ngram"),
            steered_spec(other, name="plain"),
        ),
    )
    metrics = Metrics()
    engine = build_engine(config, metrics)
    app = create_app(engine, ApiSettings(), metrics)
    with serve_in_thread(app, startup=engine.start, shutdown=engine.stop) as url:
        yield Live(url, engine)


@dataclass(frozen=True)
class Ask:
    """A request, and after how many chunks of its answer the client hangs up."""

    body: dict[str, Any]
    chunks: int | None


def one_of_many(rng: random.Random) -> Ask:
    model = rng.choice(["proxy", "both", "plain"])
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": rng.randint(1, 30),
        "temperature": 0,
        "stream": True,
    }
    body |= {"prompt": words} if rng.random() < 0.5 else {"messages": [{"role": "user", "content": words}]}
    if model != "plain" and rng.random() < 0.8:
        strength = rng.choice([0.0, round(rng.uniform(0, 2), 2)])
        body["extra_body"] = {"steering": {"weights": {"p": strength}}}
    return Ask(body, rng.randint(0, 4) if rng.random() < 0.2 else None)


async def answer(client: openai.AsyncOpenAI, ask: Ask) -> str:
    """The text, up to where the client hangs up."""
    chat = "messages" in ask.body
    create: Any = client.chat.completions.create if chat else client.completions.create
    text, chunks = "", 0
    async with await create(**ask.body) as stream:
        async for chunk in stream:
            if chunks == ask.chunks:
                break
            chunks += 1
            for choice in chunk.choices:
                text += (choice.delta.content if chat else choice.text) or ""
    return text


def test_a_hundred_clients_get_what_each_would_get_alone(live: Live) -> None:
    rng = random.Random(12)
    asked = [one_of_many(rng) for _ in range(CROWD)]

    async def session() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(
            base_url=live.url + "/v1", api_key="x", max_retries=0, timeout=120
        ) as client:
            alone = [await answer(client, Ask(ask.body, None)) for ask in asked]
            live.wait_until_idle()
            return alone, await asyncio.gather(*(answer(client, ask) for ask in asked))

    alone, crowd = asyncio.run(session())
    live.wait_until_idle()
    assert live.preemptions() > 0
    assert len(set(alone)) > CROWD // 2
    for ask, whole, text in zip(asked, alone, crowd, strict=True):
        assert text == whole if ask.chunks is None else whole.startswith(text), ask
    assert sum(text != whole for whole, text in zip(alone, crowd, strict=True)) > 5


def test_the_strength_asked_for_decides_the_text(live: Live) -> None:
    """Else the crowd's answers would be alike whatever they ask for."""
    with openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as client:

        def text(model: str, strength: float | None) -> str:
            wish = None if strength is None else {"steering": {"weights": {"p": strength}}}
            made = client.completions.create(
                model=model, prompt="the sea", max_tokens=24, temperature=0, extra_body=wish
            )
            return made.choices[0].text

        assert text("proxy", None) == text("proxy", 1.0)
        assert len({text("proxy", strength) for strength in (0.0, 1.0, 2.0)}) > 1
