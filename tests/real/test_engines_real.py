"""One file of client tests for both engines: what an `openai` client sees of SmolLM2 does not tell which one runs.

What differs is said where it does, and in server/README.md. Needs PACELINE_VLLM_PYTHON (``make test-vllm``). Either
engine is started twice, with an independent draft and with the one that comes with Paceline; the last test of each
server ends it, one by a crash, one by SIGTERM under load. In a full campaign vLLM starts once more, without a draft.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import campaign
import httpx
import openai
import pytest
from engine_measures import CERTAIN, UNDRAFTED, Rate, acceptance, beginnings, contingency, greedy_texts
from engine_servers import MODEL, SCHEDULE, Engine, Served, client_of, serving
from prometheus_client.parser import text_string_to_metric_families
from real_models import SMOLLM2
from scipy import stats
from served_process import PATIENCE_SECONDS
from vllm_process import vllm_python

from paceline.draftmodels.cut import cut_draft

pytestmark = pytest.mark.real

DRAFT = "smollm2-135m-draft"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
ANSWER = "The capital of France is Paris."
NATIVE_FIRST = "it compares with the native engine: run the native half of this file, too"
#: Acceptance by engine, draft and temperature, for the engine that is measured second.
RATES: dict[tuple[Engine, str, float], Rate] = {}
#: Drafted tokens to measure acceptance on; a twentieth of the campaign's says too little.
DRAFTED = max(campaign.size(20_000), 2_000)
#: Log-probabilities of a prompt by engine.
SCORES: dict[Engine, list[float]] = {}
#: Greedy texts without a draft by engine.
TEXTS: dict[Engine, list[str]] = {}
GREEDY = ("Once upon a time", "The three laws of motion are", "def fibonacci(n):\n", "Dear Sir or Madam,")
STREAM: dict[str, Any] = {
    "model": MODEL,
    "prompt": "Once",
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module", params=["native", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    vllm_python()  # one engine alone shows nothing here that tests/real/test_serve_real.py does not
    return cast(Engine, request.param)


@pytest.fixture(scope="module")
def independent(
    engine: Engine, real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """With 28 of the target's 30 layers as its draft."""
    folder, target = tmp_path_factory.mktemp(engine), real_model(SMOLLM2)
    draft = tmp_path_factory.mktemp("draft") / "cut"
    cut_draft(str(target), [layer for layer in range(30) if layer not in (20, 22)], draft)
    with serving(engine, folder, target, str(draft), schedule=SCHEDULE) as served:
        yield served


@pytest.fixture(scope="module")
def drafted(
    engine: Engine, real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(engine, tmp_path_factory.mktemp(engine), real_model(SMOLLM2), DRAFT) as served:
        yield served


@pytest.fixture
def client(drafted: Served) -> Iterator[openai.OpenAI]:
    with client_of(drafted) as made:
        yield made


# With an independent draft, and with none.


def test_a_server_that_loads_says_so(independent: Served) -> None:
    health, readiness, answer = independent.loading
    assert health.status_code == 200
    for refused in (readiness, answer):
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("service_unavailable", "loading")


def test_an_independent_draft_changes_no_greedy_text(independent: Served) -> None:
    undrafted = UNDRAFTED[independent.engine]
    TEXTS[independent.engine], drafted = greedy_texts(independent, GREEDY, 1, **undrafted)
    assert drafted == 0
    prompts = CERTAIN if independent.engine == "vllm" else (*GREEDY, *CERTAIN)
    alone, drafted = greedy_texts(independent, prompts, 1, **undrafted)
    assert drafted == 0
    together, drafted = greedy_texts(independent, prompts, 4)
    assert drafted > 0
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_independent_draft_is_accepted_as_often_on_both_engines(
    independent: Served, temperature: float, record_property: Callable[[str, object], None]
) -> None:
    found = compare_acceptance(independent, temperature)
    record_property(f"{independent.engine} T={temperature:g}", found)


def test_sampled_text_has_the_same_distribution_with_either_draft(
    independent: Served, drafted: Served
) -> None:
    """Three samples of the first four tokens; with a draft three of them come from verified blocks."""
    requests = campaign.size(160)
    undrafted = UNDRAFTED[independent.engine]
    for temperature, extra in ((1.0, {}), (0.7, {"top_k": 12})):
        with client_of(independent) as one, client_of(drafted) as other:
            plain, none = beginnings(one, requests, 64, temperature, **extra, **undrafted)
            cut, some = beginnings(one, 2 * requests, 16, temperature, **extra)
            feature, more = beginnings(other, requests, 64, temperature, **extra)
        # vLLM takes up 64 sequences in several steps, and drafts while they are few.
        assert none <= some, (none, some)
        assert more > some / 2
        table = contingency(plain, cut, feature)
        assert table.shape[1] > 3
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_seeds_and_choices(
    engine: Engine, independent: Served, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if engine == "native":
        repeats_by_seed(independent)
        return
    if not campaign.FULL:
        pytest.skip("vLLM takes seeds without a draft only, a third start: PACELINE_CAMPAIGN=full")
    with serving(engine, tmp_path, real_model(SMOLLM2), None) as plain:
        repeats_by_seed(plain)


def repeats_by_seed(served: Served) -> None:
    with client_of(served) as client:

        def ask(seed: int) -> list[str | None]:
            answer = client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=1, seed=seed, n=3, max_tokens=12
            )
            return [choice.message.content for choice in answer.choices]

        first = ask(7)
        assert first == ask(7)
        assert first != ask(8)
        assert len(set(first)) > 1


def test_a_crash_ends_streams_and_server(independent: Served) -> None:
    last, url = b"", independent.url + "/v1/completions"
    with httpx.stream("POST", url, json=STREAM, timeout=PATIENCE_SECONDS) as answer:
        for count, line in enumerate(answer.iter_lines()):
            last = line.encode() or last
            if count == 0:
                independent.crash()
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "request id" in error["message"]
    assert "bug" not in error["message"]  # nothing of what happened inside
    assert independent.process.ends() == 1
    assert "the engine failed" in independent.process.err


# With the draft that comes with Paceline.


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
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    stopped = client.chat.completions.create(**asked, stop=["Paris"])
    assert stopped.choices[0].message.content == "The capital of France is "
    cut = client.chat.completions.create(**asked | {"max_tokens": 3})
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("The capital of", "length")


def test_logprobs_of_answer_and_prompt(drafted: Served, client: openai.OpenAI) -> None:
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
    first, *values = scored.choices[0].logprobs.token_logprobs or []
    assert first is None
    SCORES[drafted.engine] = [value for value in values if value is not None]
    assert len(SCORES[drafted.engine]) == 2
    assert "native" in SCORES, NATIVE_FIRST
    # bf16 on both, rounded elsewhere.
    assert SCORES[drafted.engine] == pytest.approx(SCORES["native"], abs=0.2)


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


def test_what_a_request_may_say_of_drafts(drafted: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "temperature": 0}
    for wish in ({"enabled": False}, {"max_draft_tokens": 1}, {"draft": "ngram"}):
        if drafted.engine == "vllm":
            with pytest.raises(openai.BadRequestError, match="native engine") as refused:
                client.completions.create(**asked, extra_body={"speculation": wish})
            assert refused.value.code == "native_engine_only"
        elif "draft" not in wish:  # n-grams are switched off here
            client.completions.create(**asked, extra_body={"speculation": wish})


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
                    client.chat.completions.create(
                        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24
                    )
                    for _ in range(8)
                )
            )
            assert {answer.choices[0].message.content for answer in answers} == {ANSWER}

    asyncio.run(main())


def test_greedy_text_is_that_without_a_draft(drafted: Served) -> None:
    texts, count = greedy_texts(drafted, GREEDY, 1)
    assert count > 0
    assert texts == TEXTS[drafted.engine]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_the_same_on_both_engines(
    drafted: Served, temperature: float, record_property: Callable[[str, object], None]
) -> None:
    found = compare_acceptance(drafted, temperature)
    record_property(f"{drafted.engine} T={temperature:g}", found)


def compare_acceptance(served: Served, temperature: float) -> str:
    """Measure it, and compare it with the native engine's; what was found."""
    rate = acceptance(served, temperature, DRAFTED)
    assert served.draft is not None
    draft = Path(served.draft).name
    RATES[served.engine, draft, temperature] = rate
    assert ("native", draft, temperature) in RATES, NATIVE_FIRST
    native = RATES["native", draft, temperature]
    # The error of a rate is about 0.005 from 20,000 drafted tokens, 0.025 from 2,000.
    margin = max(0.03, 4 * math.hypot(rate.error, native.error))
    assert abs(rate.value - native.value) < margin, (str(rate), str(native))
    assert rate.value > 0.1
    return str(rate)


def test_metrics_carry_each_name_once(drafted: Served, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=0)
    text = httpx.get(drafted.url + "/metrics").text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(typed) == len(set(typed))
    samples = {s.name: s.value for family in families for s in family.samples}
    for name in (
        "generation_tokens",
        "prompt_tokens",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
    ):
        assert samples[f"vllm:{name}_total"] > 0
    accepted = samples["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted < samples["vllm:spec_decode_num_draft_tokens_total"]
    assert ("vllm:cache_config_info" in samples) == (drafted.engine == "vllm")
    assert "paceline:step_seconds" in names


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
