"""``paceline serve`` with the default model, as a newcomer runs it: curl, the openai client, bench, SIGTERM."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from real_models import SMOLLM2
from served_process import PATIENCE_SECONDS, ServedProcess, paceline_serve

pytestmark = pytest.mark.real

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def served(
    real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedProcess]:
    real_model(SMOLLM2)  # so that the server finds it in the cache
    with paceline_serve(
        tmp_path_factory.mktemp("served"), SMOLLM2, "--draft", "ngram", "--drain-seconds", "300"
    ) as process:
        yield process


@pytest.fixture
def client(served: ServedProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=served.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_SECONDS
    ) as made:
        yield made


def test_the_printed_command_answers(served: ServedProcess) -> None:
    command = served.out.partition("Try it:\n")[2]
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    choice = json.loads(answer.stdout)["choices"][0]
    assert "Paris" in choice["message"]["content"]


def test_openai_client(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": SMOLLM2, "messages": QUESTION, "max_tokens": 24}
    answer = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    text = choice.message.content or ""
    assert "Paris" in text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for entry in choice.logprobs.content:  # greedy: the best token was taken
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-3)
    assert "".join(entry.token for entry in choice.logprobs.content).startswith(text)
    stream = client.chat.completions.create(**asked, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text
    three = client.chat.completions.create(**asked, temperature=1, seed=5, n=3)
    assert len({choice.message.content for choice in three.choices}) == 3


def test_async_openai_client(served: ServedProcess) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client:

            async def ask(seed: int) -> str | None:
                answer = await client.chat.completions.create(
                    model=SMOLLM2, messages=QUESTION, seed=seed, max_tokens=24, temperature=0.8
                )
                return answer.choices[0].message.content

            together = await asyncio.gather(*(ask(seed) for seed in range(6)))
            assert len(set(together)) > 1
            assert [await ask(seed) for seed in range(6)] == together

    asyncio.run(main())


def test_bench_measures_it(served: ServedProcess) -> None:
    program = str(Path(sys.executable).with_name("paceline"))
    options = ["--concurrency", "1,4", "--num-prompts", "4", "--max-tokens", "8"]
    bench = subprocess.run(
        [program, "bench", "--url", served.url, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(bench.stdout.splitlines()[-1])
    assert [level["errors"] for level in result["levels"]] == [0, 0]


def test_a_running_stream_outlives_sigterm(served: ServedProcess) -> None:
    """The last test of this file: it ends the server."""
    # Long enough to be running still when the signal has come, and no draft to make it short.
    body: dict[str, Any] = {
        "model": SMOLLM2,
        "prompt": "Once",
        "max_tokens": 600,
        "ignore_eos": True,
        "stream": True,
    }
    body |= {"temperature": 0, "speculation": {"enabled": False}}
    url = served.url + "/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_SECONDS) as response:
        lines = (line for line in response.iter_lines() if line)
        begun = next(lines)
        served.drained()
        refused = httpx.post(url, json=body | {"stream": False}, timeout=PATIENCE_SECONDS)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        *rest, done = lines
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in (begun, *rest)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert served.ends() == 0
    assert "Traceback" not in served.err
