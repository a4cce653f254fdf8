"""A served process under a long mixed load: nothing crashes, nothing leaks, seeds keep their promise.

Clients of three tiny models (drafted, plain, n-gram) ask for all sorts of things at once, and a quarter of them hang
up at a random moment. Whatever was answered whole is asked again alone and without speculation: the same text must
come back. ``make soak`` sends 10,000 requests, the ordinary suite a twentieth.
"""

import asyncio
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from campaign import size
from served_process import ServedProcess, paceline_serve

REQUESTS = size(10_000)
CLIENTS = 32
COMPARED = size(2_000)
#: What the process may grow by in the second half; one leaked request is some kB.
GROWTH_BYTES = 32 * 2**20
GAUGES = re.compile(
    r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (.+)$", re.M
)

CONFIG = """
[server]
max_queued_requests = 1000
[engine]
device = "cpu"
threads = 1
kv_cache_gib = 0.004
max_batch_tokens = 96
max_running = 16
[[models]]
name = "drafted"
target = "{llama}"
weights = "fp32"
[models.speculation]
draft = "{draft}"
[[models]]
name = "plain"
target = "{llama}"
weights = "fp32"
[[models]]
name = "other"
target = "{qwen}"
weights = "fp32"
[models.speculation]
draft = "ngram"
max_draft_tokens = 6
"""


@pytest.fixture
def served(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[ServedProcess]:
    folders = {
        "llama": tiny_checkpoint("llama"),
        "draft": tiny_checkpoint("llama", perturb=0.02),
        "qwen": tiny_checkpoint("qwen2"),
    }
    (tmp_path / "paceline.toml").write_text(CONFIG.format(**folders))
    with paceline_serve(tmp_path, "--config", str(tmp_path / "paceline.toml")) as process:
        yield process


def body(rng: random.Random) -> dict[str, Any]:
    """A valid completion request whose answer is a function of the request."""
    made: dict[str, Any] = {
        "model": rng.choice(("drafted", "plain", "other")),
        "prompt": "".join(rng.choices("the cat sat on a mat. ", k=rng.randint(1, 150))),
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice((0.0, 0.7, 1.2)),
        "seed": rng.randrange(2**32),
        "n": rng.choice((1, 1, 1, 3)),
        "stream": rng.random() < 0.5,
        "ignore_eos": rng.random() < 0.5,
    }
    optional: dict[str, Any] = {
        "stop": [rng.choice("abc ") + rng.choice("xyz ")],
        "logprobs": rng.randint(0, 5),
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "speculation": rng.choice(
            ({"enabled": False}, {"draft": "ngram", "max_draft_tokens": rng.randint(1, 8)})
        ),
    }
    return made | {name: value for name, value in optional.items() if rng.random() < 0.25}


async def ask(http: httpx.AsyncClient, asked: dict[str, Any]) -> list[str]:
    """The text of every choice."""
    texts = [""] * asked["n"]
    async with http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, await response.aread()
        if not asked["stream"]:
            answer = json.loads(await response.aread())
            return [choice["text"] for choice in answer["choices"]]
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]", lines
    for line in lines:
        for choice in json.loads(line)["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


async def ask_or_leave(
    http: httpx.AsyncClient, asked: dict[str, Any], leaves: float | None
) -> list[str] | None:
    """As ``ask``; None if the client hung up, ``leaves`` seconds after asking."""
    try:
        return await asyncio.wait_for(ask(http, asked), leaves)
    except TimeoutError:
        return None


async def load(url: str, rng: random.Random, count: int) -> list[tuple[dict[str, Any], list[str]]]:
    """Send ``count`` requests, ``CLIENTS`` at a time; what was asked and answered."""
    answered: list[tuple[dict[str, Any], list[str]]] = []
    asked = iter([(body(rng), rng.random() * 0.5 if rng.random() < 0.25 else None) for _ in range(count)])
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def client() -> None:
            for question, leaves in asked:
                texts = await ask_or_leave(http, question, leaves)
                if texts is not None:
                    answered.append((question, texts))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answered


async def compare(url: str, answered: list[tuple[dict[str, Any], list[str]]]) -> None:
    """Ask again, one at a time, without speculation and not streamed."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for asked, texts in answered:
            alone = asked | {"speculation": {"enabled": False}, "stream": False}
            assert await ask(http, alone) == texts, asked


def is_busy(url: str) -> bool:
    """Whether any model runs, queues or holds KV blocks for a request."""
    values = [float(value) for value in GAUGES.findall(httpx.get(url + "/metrics").text)]
    assert len(values) == 9  # three gauges of three models
    return any(values)


def test_soak(served: ServedProcess, record_property: Callable[[str, object], None]) -> None:
    rng, memory = random.Random(20), psutil.Process(served.child.pid).memory_info
    answered = asyncio.run(load(served.url, rng, REQUESTS // 2))
    before = memory().rss
    answered += asyncio.run(load(served.url, rng, REQUESTS - REQUESTS // 2))
    served.until(lambda: not is_busy(served.url))
    growth = memory().rss - before
    record_property(
        "answered whole", f"{len(answered)} of {REQUESTS}, second half grew {growth / 2**20:.1f} MiB"
    )
    assert REQUESTS * 0.7 < len(answered) < REQUESTS
    assert growth < GROWTH_BYTES
    asyncio.run(compare(served.url, rng.sample(answered, COMPARED)))
    served.child.send_signal(signal.SIGTERM)
    assert served.ends() == 0
    assert "Traceback" not in served.err
