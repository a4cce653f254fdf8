"""The `openai` client, unmodified, against the live API."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from fake_engine import REPLY, FakeEngine, event
from live_server import serve_in_thread

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.errors import EngineError, QueueFullError
from paceline.server.metrics import Metrics

TEXT = "".join(REPLY)
HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def base_url(engine: FakeEngine) -> Iterator[str]:
    with serve_in_thread(create_app(engine, ApiSettings(api_keys=("k",)), Metrics())) as url:
        yield url + "/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="k", max_retries=0, timeout=30) as client:
        yield client


def test_chat_with_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HI, n=3, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == [f"{TEXT}{i}" for i in range(3)]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].token == "H"
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_conversation_goes_on_with_what_came_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HI)
    echoed = answer.choices[0].message.model_dump()
    again = client.chat.completions.create(model="fake", messages=[*HI, echoed, *HI])  # type: ignore[list-item]
    assert again.choices[0].message.content == TEXT + "0"


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: TEXT + "0", 1: TEXT + "1"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


def test_accumulated_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=HI, logprobs=True) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT + "0"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=3, logprobs=2, echo=True)
    assert [choice.text for choice in answer.choices] == [f"{p}{TEXT}{i}" for p in "ab" for i in range(3)]
    logprobs = answer.choices[4].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[1] == "b"
    stream = client.completions.create(model="fake", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT + "0"


def test_async_client(base_url: str) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="k", max_retries=0, timeout=30) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(model="fake", messages=HI, n=3),
                client.chat.completions.create(model="fake", messages=HI, stream=True),
            )
            assert len(whole.choices) == 3
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(text) == TEXT + "0"

    asyncio.run(scenario())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "paceline"


def test_extra_body(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(
        model="fake",
        prompt="a",
        extra_body={"speculation": {"max_draft_tokens": 3}, "top_k": 5, "ignore_eos": True},
    )
    assert engine.submitted[0].speculation.max_draft_tokens == 3
    assert engine.submitted[0].sampling.top_k == 5
    assert answer.model_extra is not None
    assert answer.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] == 2


def test_errors_become_the_client_s_exceptions(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="a", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.refuse = QueueFullError("full")
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="fake", prompt="a")
    assert full.value.request_id == full.value.response.headers["x-request-id"]


def test_a_failing_stream_raises(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: iter([event(request, 0, "x"), EngineError("broken")])
    stream = client.chat.completions.create(model="fake", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="request id"):
        list(stream)


def test_closing_a_stream_stops_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    def endless() -> Iterator[object]:
        while True:
            yield asyncio.sleep(0.001)
            yield event(engine.submitted[0], 0, "x")

    engine.script = lambda request: endless()  # type: ignore[assignment, return-value]
    stream = client.completions.create(model="fake", prompt="a", stream=True)
    next(stream)
    stream.close()
    for _ in range(2000):
        if engine.closed:
            break
        asyncio.run(asyncio.sleep(0.005))
    assert engine.closed == [engine.submitted[0].id]
