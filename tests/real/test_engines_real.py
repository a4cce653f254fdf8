"""One file of client tests for both engines: what an `openai` client sees of SmolLM2 does not tell which one runs.

What differs is said where it does: vLLM refuses a seed for sampled text beside a draft (server/README.md). The vLLM half
needs PACELINE_VLLM_PYTHON. Each engine is started twice, with the draft that comes with Paceline and without one; the
last test of each server ends it, one by SIGTERM under load, one by a crash.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import campaign
import httpx
import numpy as np
import openai
import pytest
from engine_servers import MODEL, Engine, Served, serving
from prometheus_client.parser import text_string_to_metric_families
from real_models import SMOLLM2
from scipy import stats
from served_process import PATIENCE_SECONDS

pytestmark = pytest.mark.real

DRAFT = "smollm2-135m-draft"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
ANSWER = "The capital of France is Paris."
PROMPTS = Path(__file__).parents[2] / "draftmodels" / "evaluate" / "prompts.jsonl"
#: Acceptance by engine and temperature, for the engine that is measured second.
RATES: dict[tuple[Engine, float], float] = {}
#: Greedy texts without a draft by engine.
TEXTS: dict[Engine, list[str]] = {}
GREEDY = ("Once upon a time", "The three laws of motion are", "def fibonacci(n):\n", "Dear Sir or Madam,")
STREAM: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module", params=["native", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return cast(Engine, request.param)


@pytest.fixture(scope="module")
def plain(
    engine: Engine, real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(engine, tmp_path_factory.mktemp(engine), real_model(SMOLLM2), None) as served:
        yield served


@pytest.fixture(scope="module")
def drafted(
    engine: Engine, real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(engine, tmp_path_factory.mktemp(engine), real_model(SMOLLM2), DRAFT) as served:
        yield served


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_SECONDS)


@pytest.fixture
def client(drafted: Served) -> Iterator[openai.OpenAI]:
    with client_of(drafted) as made:
        yield made


def greedy_texts(client: openai.OpenAI) -> list[str]:
    return [
        client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=48).choices[0].text
        for prompt in GREEDY
    ]


# Without a draft.


def test_seeds_and_choices(plain: Served) -> None:
    with client_of(plain) as client:

        def ask(seed: int) -> list[str | None]:
            answer = client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=1, seed=seed, n=3, max_tokens=12
            )
            return [choice.message.content for choice in answer.choices]

        first = ask(7)
        assert first == ask(7)
        assert first != ask(8)
        assert len(set(first)) > 1
        TEXTS[plain.engine] = greedy_texts(client)


def test_sampled_text_has_the_same_distribution_with_a_draft(plain: Served, drafted: Served) -> None:
    """Two samples of the first four tokens; three of them come from verified blocks."""
    for sampling in ({"temperature": 1.0}, {"temperature": 0.7, "extra_body": {"top_k": 12}}):
        with client_of(plain) as one, client_of(drafted) as other:
            counts = [first_words(asked, sampling) for asked in (one, other)]
        common = [text for text, n in (counts[0] + counts[1]).items() if n >= 20]
        table = np.array([[*(c[text] for text in common), c.total() - sum(c[t] for t in common)] for c in counts])
        table = table[:, table.sum(axis=0) > 0]
        assert table.shape[1] > 5
        assert stats.chi2_contingency(table).pvalue > 1e-4


def first_words(client: openai.OpenAI, sampling: dict[str, Any]) -> Counter[str]:
    drawn: Counter[str] = Counter()
    for _ in range(campaign.size(160)):
        answer = client.completions.create(model=MODEL, prompt="The weather is", n=64, max_tokens=4, **sampling)
        drawn.update(choice.text for choice in answer.choices)
    return drawn


def test_a_crash_ends_streams_and_server(plain: Served) -> None:
    last = b""
    with httpx.stream("POST", plain.url + "/v1/completions", json=STREAM, timeout=PATIENCE_SECONDS) as answer:
        for count, line in enumerate(answer.iter_lines()):
            last = line.encode() or last
            if count == 0:
                plain.crash()
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "request id" in error["message"]
    assert "bug" not in error["message"]  # nothing of what happened inside
    assert plain.process.ends() == 1
    assert "the engine failed" in plain.process.err


# With the draft.


def test_models_and_health(drafted: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "paceline"
    assert (drafted.process.status("/health"), drafted.process.status("/ready")) == (200, 200)


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.model_extra is not None
    assert whole.model_extra["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    stopped = client.chat.completions.create(**asked, stop=["Paris"])
    assert stopped.choices[0].message.content == "The capital of France is "
    cut = client.chat.completions.create(**asked | {"max_tokens": 3})
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("The capital of", "length")


def test_logprobs_of_answer_and_prompt(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == "The capital of France is Paris"
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob < 0 for entry in entries)
    scored = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "The sky is"
    assert scored.choices[0].logprobs is not None
    values = scored.choices[0].logprobs.token_logprobs or []
    # Of the weights in bf16 as torch computes them, up to its rounding.
    assert values == [None, pytest.approx(-7.15, abs=0.4), pytest.approx(-1.56, abs=0.3)]


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=MODEL, prompt="a", extra_body={"unheard_of": 1})
    assert unknown.value.param == "unheard_of"


def test_a_seed_beside_a_draft(drafted: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once", "seed": 5, "max_tokens": 16}
    if drafted.engine == "vllm":
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**asked, temperature=1)
        assert (refused.value.param, refused.value.code) == ("seed", "native_engine_only")
        return
    texts = [client.completions.create(**asked, temperature=1).choices[0].text for _ in range(2)]
    assert texts[0] == texts[1]


def test_async_clients_side_by_side(drafted: Served) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=drafted.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_SECONDS
        ) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
                    for _ in range(8)
                )
            )
            assert {answer.choices[0].message.content for answer in answers} == {ANSWER}

    asyncio.run(main())


def test_greedy_text_is_that_without_a_draft(drafted: Served, client: openai.OpenAI) -> None:
    assert greedy_texts(client) == TEXTS[drafted.engine]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_the_same_on_both_engines(
    drafted: Served, temperature: float, record_property: Callable[[str, object], None]
) -> None:
    drafted_tokens, accepted = acceptance(drafted, temperature)
    RATES[drafted.engine, temperature] = rate = accepted / drafted_tokens
    record_property("drafted, accepted", f"{drafted.engine} T={temperature}: {drafted_tokens}, {rate:.4f}")
    assert rate > 0.1
    other = RATES.get(("native", temperature))
    if drafted.engine == "vllm" and other is not None:
        # Of 20,000 drafted tokens the difference has a standard error of 0.005, of 1,000 one of 0.02.
        assert rate == pytest.approx(other, abs=0.03 if campaign.FULL else 0.08)


def acceptance(served: Served, temperature: float) -> tuple[int, int]:
    """Drafted and accepted tokens of answers to the built-in prompts."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    totals = [0, 0]
    with httpx.Client(timeout=PATIENCE_SECONDS) as http, ThreadPoolExecutor(16) as pool:

        def ask(prompt: str) -> dict[str, int]:
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
            body |= {"temperature": temperature, "max_tokens": 160 if campaign.FULL else 48}
            answer = http.post(served.url + "/v1/chat/completions", json=body).json()
            return cast(dict[str, int], answer["metrics"]["speculative_decoding"])

        for start in range(0, 1_000_000, 16):
            some = [prompts[i % len(prompts)] for i in range(start, start + 16)]
            for figures in pool.map(ask, some):
                totals[0] += figures["num_draft_tokens"]
                totals[1] += figures["num_accepted_draft_tokens"]
            if totals[0] >= campaign.size(20_000):
                break
    return totals[0], totals[1]


def test_metrics_carry_each_name_once(drafted: Served, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=0)
    text = httpx.get(drafted.url + "/metrics").text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(typed) == len(set(typed))
    samples = {s.name: s.value for family in families for s in family.samples}
    for name in ("generation_tokens", "prompt_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"):
        assert samples[f"vllm:{name}_total"] > 0
    accepted = samples["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted < samples["vllm:spec_decode_num_draft_tokens_total"]
    assert ("vllm:cache_config_info" in samples) == (drafted.engine == "vllm")
    assert "paceline:draft_info" in samples


def test_sigterm_under_load_drains(drafted: Served) -> None:
    url = drafted.url + "/v1/completions"
    body = STREAM | {"max_tokens": 600, "temperature": 0}
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_SECONDS) as response:
        lines = (line for line in response.iter_lines() if line)
        begun = next(lines)
        drafted.process.drained()
        assert drafted.process.status("/health") == 200
        refused = httpx.post(url, json=body | {"stream": False}, timeout=PATIENCE_SECONDS)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        *rest, done = lines
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in (begun, *rest)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert drafted.process.ends() == 0
    assert "Traceback" not in drafted.process.err
