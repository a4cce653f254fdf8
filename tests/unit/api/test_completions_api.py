"""Whole (not streamed) answers of /v1/completions, and what reaches the engine."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_client import AsgiClient, assert_openai_error
from fake_engine import BOS_ID, EOS_ID, REPLY, FakeEngine, Scripted, event, model_info

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.engine.request import (
    Request,
    SamplingParams,
    SpeculationParams,
    TokenEvent,
    TokenLogprob,
)
from paceline.server.errors import EngineError
from paceline.server.metrics import Metrics

TEXT = "".join(REPLY) + "0"
TOKENS = len(TEXT.encode()) + 1  # One per byte, and the end of the sequence.


def complete(client: AsgiClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", {"model": "fake", "prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_the_whole_shape(client: AsgiClient, engine: FakeEngine) -> None:
    body = complete(client)
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "system_fingerprint": "fp_fake",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": TOKENS,
            "total_tokens": 3 + TOKENS,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "metrics": {
            "speculative_decoding": {
                "mean_acceptance_length": 2.5,
                "draft_acceptance_rate": 0.375,
                "acceptance_histogram": [0, 1, 1, 0, 0],
                "num_spec_steps": 2,
                "num_accepted_draft_tokens": 3,
                "num_draft_tokens": 8,
                "num_spec_tokens": 4,
            }
        },
    }
    assert not engine.open


def test_defaults(client: AsgiClient, engine: FakeEngine) -> None:
    complete(client)
    request = engine.submitted[0]
    assert request.prompt_ids == (BOS_ID, *b"hi")
    assert (request.model, request.n) == ("fake", 1)
    assert request.sampling == SamplingParams(max_tokens=16)
    assert request.speculation == SpeculationParams()


def test_every_sampling_field_reaches_the_engine(client: AsgiClient, engine: FakeEngine) -> None:
    complete(
        client,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        n=2,
        stop=["a", "bc"],
        stop_token_ids=[7],
        ignore_eos=True,
        min_tokens=2,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "6": 3.5},
        logprobs=5,
        speculation={"enabled": True, "max_draft_tokens": 2, "draft": "ngram", "lenience": 1},
    )
    request = engine.submitted[0]
    assert request.n == 2
    assert request.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        min_tokens=2,
        stop=("a", "bc"),
        stop_token_ids=(7,),
        ignore_eos=True,
        seed=-3,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={5: -100.0, 6: 3.5},
        logprobs=5,
    )
    assert request.speculation == SpeculationParams(enabled=True, max_draft_tokens=2, draft="ngram")


def test_nulls_mean_absent_and_bookkeeping_is_accepted(client: AsgiClient, engine: FakeEngine) -> None:
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "echo",
    ]
    names += [
        "stream",
        "stream_options",
        "speculation",
        "steering",
        "prediction",
        "response_format",
        "best_of",
    ]
    names += ["suffix", "never_heard_of"]
    kept = {
        "store": True,
        "metadata": {"a": None},
        "service_tier": "auto",
        "user": "u",
        "prompt_cache_key": "k",
    }
    complete(client, **dict.fromkeys(names), **kept)
    complete(client, response_format={"type": "text"})
    assert engine.submitted[0].sampling == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (1, 1), (257, 257), (258, 0), (10**9, 0)])
def test_top_k_that_keeps_everything_is_off(
    client: AsgiClient, engine: FakeEngine, top_k: int, expected: int
) -> None:
    complete(client, top_k=top_k)
    assert engine.submitted[0].sampling.top_k == expected


@pytest.mark.parametrize("seed", [0, -(2**63), 2**64 - 1])
def test_any_64_bit_seed(client: AsgiClient, engine: FakeEngine, seed: int) -> None:
    complete(client, seed=seed, stop="x", best_of=1)
    assert engine.submitted[0].sampling.seed == seed
    assert engine.submitted[0].sampling.stop == ("x",)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(BOS_ID, 97, 98)]),
        (["a", "b"], [(BOS_ID, 97), (BOS_ID, 98)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
def test_prompt_shapes(client: AsgiClient, engine: FakeEngine, prompt: Any, expected: list[Any]) -> None:
    body = complete(client, prompt=prompt)
    assert [request.prompt_ids for request in engine.submitted] == expected
    assert len({request.id for request in engine.submitted}) == len(expected)
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3 * len(expected)}


def test_choices_of_several_prompts_are_in_order(client: AsgiClient) -> None:
    body = complete(client, prompt=["p", "q"], n=3, echo=True)
    texts = [(choice["index"], choice["text"]) for choice in body["choices"]]
    expected = [f"{prompt}{''.join(REPLY)}{choice}" for prompt in "pq" for choice in range(3)]
    assert texts == list(enumerate(expected))
    assert body["usage"]["completion_tokens"] == 6 * TOKENS
    metrics = body["metrics"]["speculative_decoding"]
    assert metrics["acceptance_histogram"] == [0, 6, 6, 0, 0]
    assert metrics["mean_acceptance_length"] == 2.5


def test_logprobs(client: AsgiClient) -> None:
    logprobs = complete(client, logprobs=2)["choices"][0]["logprobs"]
    ids = [*TEXT.encode(), EOS_ID]
    assert len(logprobs["tokens"]) == len(ids)
    assert logprobs["tokens"][:5] == list("Hello")
    # The two bytes of ö are told apart, and start where the character starts.
    assert logprobs["tokens"][7:9] == ["bytes:\\xc3", "bytes:\\xb6"]
    assert logprobs["text_offset"] == [*range(8), 7, *range(8, 14)]
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert logprobs["top_logprobs"][0] == {"H": -0.5, "I": -1.5}


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ("ab", "ab", [0, 0, 1, 2]),  # The begin token that the tokenizer adds is no text.
        ([256, 97, 98], "ab", [0, 0, 1, 2]),
        ("<s>ab", "<s>ab", [0, 3, 3, 4, 5]),  # Spelled out by the client; the tokenizer adds another one.
    ],
)
def test_offsets_of_special_tokens(client: AsgiClient, prompt: Any, text: str, offsets: list[int]) -> None:
    choice = complete(client, prompt=prompt, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert choice["text"] == text + TEXT
    assert choice["logprobs"]["text_offset"][: len(offsets)] == offsets


def test_the_chosen_token_is_among_the_top_logprobs(client: AsgiClient) -> None:
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0] == {"H": -0.5}


@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs_scores_the_prompt(client: AsgiClient, engine: FakeEngine, n: int) -> None:
    body = complete(client, prompt=[97, 98, 99], echo=True, logprobs=1, n=n)
    assert engine.submitted[0].sampling.prompt_logprobs == 1
    for choice in body["choices"]:
        assert choice["text"].startswith("abc" + REPLY[0])
        logprobs = choice["logprobs"]
        assert logprobs["tokens"][:4] == ["a", "b", "c", "H"]
        assert logprobs["token_logprobs"][:4] == [None, -1.0, -1.0, -0.5]
        assert logprobs["top_logprobs"][:2] == [None, {"b": -1.0}]
        assert logprobs["text_offset"][:4] == [0, 1, 2, 3]


def test_scoring_without_generation(client: AsgiClient, engine: FakeEngine) -> None:
    body = complete(client, prompt=[[97, 98], [99]], max_tokens=0, echo=True, logprobs=1)
    assert [choice["text"] for choice in body["choices"]] == ["ab", "c"]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert engine.submitted[0].sampling.max_tokens == 0


def test_echo_without_logprobs_repeats_the_text(client: AsgiClient, engine: FakeEngine) -> None:
    assert complete(client, prompt="Grüß", echo=True)["choices"][0]["text"] == "Grüß" + TEXT
    assert engine.submitted[0].sampling.prompt_logprobs is None


def test_minus_infinity_is_a_number_on_the_wire(client: AsgiClient, engine: FakeEngine) -> None:
    def script(request: Request) -> Iterator[Scripted]:
        entry = TokenLogprob(97, float("-inf"), ((98, -0.1),))
        yield TokenEvent(0, "a", (97,), logprobs=(entry,), finish_reason="length")

    engine.script = script
    logprobs = complete(client, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"b": -0.1, "a": -9999.0}]


@pytest.mark.parametrize("wish", [{"enabled": False}, {"max_draft_tokens": 0}])
def test_no_speculation_metrics_without_speculation(client: AsgiClient, wish: dict[str, Any]) -> None:
    assert "metrics" not in complete(client, speculation=wish)


def test_speculation_metrics_follow_the_model_default() -> None:
    engine = FakeEngine(model_info(default_draft=None))
    client = AsgiClient(create_app(engine, ApiSettings(), Metrics()))
    assert "metrics" not in complete(client)
    assert "metrics" in complete(client, speculation={"draft": "ngram"})


def test_speculation_that_never_ran_has_null_rates(client: AsgiClient, engine: FakeEngine) -> None:
    engine.script = lambda request: iter([event(request, 0, "x", finish_reason="length")])
    assert complete(client)["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": None,
        "draft_acceptance_rate": None,
        "acceptance_histogram": [],
        "num_spec_steps": 0,
        "num_accepted_draft_tokens": 0,
        "num_draft_tokens": 0,
        "num_spec_tokens": 0,
    }


@pytest.mark.parametrize("script", [[EngineError("secret detail")], [ValueError("secret detail")], []])
def test_engine_failure_is_a_500_without_internals(
    client: AsgiClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture, script: list[Scripted]
) -> None:
    engine.script = lambda request: iter(script)
    response = client.post(
        "/v1/completions", {"model": "fake", "prompt": "hi"}, headers={"x-request-id": "case-7"}
    )
    error = assert_openai_error(response, 500, type="server_error")
    assert "case-7" in error["message"]
    assert "secret" not in response.text
    assert any(record.exc_info and "case-7" in record.getMessage() for record in caplog.records)
    assert engine.closed == [engine.submitted[0].id]


def test_one_failing_prompt_closes_the_others(client: AsgiClient, engine: FakeEngine) -> None:
    def script(request: Request) -> Iterator[Scripted]:
        if request.id.endswith("-1"):
            yield EngineError("broken")
        yield event(request, 0, "x")
        yield asyncio.Event().wait()

    engine.script = script
    response = client.post("/v1/completions", {"model": "fake", "prompt": ["a", "b", "c"]})
    assert_openai_error(response, 500)
    assert sorted(engine.closed) == sorted(request.id for request in engine.submitted)
