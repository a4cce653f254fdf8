"""``steering`` in requests: strengths by pair, prompts of the members, refusals that name the field."""

from typing import Any

import pytest
from asgi_client import AsgiClient, assert_openai_error
from fake_engine import ByteTokenizer, FakeEngine, model_info

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.decoding.mixture import Pair
from paceline.server.engine.interface import PromptView, SteeringInfo
from paceline.server.engine.request import Request, SteeringParams
from paceline.server.metrics import Metrics

PAIRS = (
    Pair("sql", "proxy", 1, 2, 1.0, (0.0, 2.0)),
    Pair("more", "amplify", 1, 2, 1.5, (0.0, 3.0)),
    Pair("stay", "cfg", None, 3, 0.5, (0.0, 4.0)),
)


class OtherTemplate(ByteTokenizer):
    """A template that another model would have."""

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool = True) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


#: Expert with a template and a prefix, anti-expert as the target, and the target under another prompt.
VIEWS = (PromptView(template=OtherTemplate(), prefix="Ans:"), PromptView(), PromptView(prompt="other"))


def engine_of(pairs: tuple[Pair, ...] = PAIRS, views: tuple[PromptView, ...] = VIEWS) -> FakeEngine:
    return FakeEngine(model_info(steering=SteeringInfo(pairs, views)), model_info("plain"))


def ask(engine: FakeEngine, **body: Any) -> Any:
    client = AsgiClient(create_app(engine, ApiSettings(), Metrics()))
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return client.post(path, json={"model": "fake", **body})


def submitted(engine: FakeEngine, **body: Any) -> Request:
    answer = ask(engine, **body)
    assert answer.status_code == 200, answer.text
    return engine.submitted[-1]


def text_of(ids: tuple[int, ...]) -> str:
    return bytes(i for i in ids if i < 256).decode()


@pytest.mark.parametrize(
    ("wish", "strengths"),
    [
        (None, {}),
        ({"beta": 2.0}, {"more": 2.0}),
        ({"beta": 0.0}, {"more": 0.0}),
        ({"weights": {"sql": 0.5, "stay": 0}}, {"sql": 0.5, "stay": None}),
        ({"weights": {"more": 0}}, {"more": None}),
        ({"alpha": None, "beta": 1}, {"more": 1.0}),
    ],
)
def test_strengths_reach_the_engine(wish: Any, strengths: dict[str, float | None]) -> None:
    body = {} if wish is None else {"steering": wish}
    assert submitted(engine_of(), prompt="hi", **body).steering.strengths == strengths


def test_alpha_is_the_only_such_pairs() -> None:
    assert submitted(engine_of(PAIRS[:2]), prompt="hi", steering={"alpha": 1.5}).steering.strengths == {
        "sql": 1.5
    }
    assert submitted(engine_of(PAIRS[:2]), prompt="hi", steering={"alpha": 0}).steering.strengths == {
        "sql": None
    }


@pytest.mark.parametrize(
    ("wish", "param", "words"),
    [
        (
            {"alpha": 1.0},
            "steering.alpha",
            "several pairs with alpha; name one in 'steering.weights': sql, more, stay",
        ),
        ({}, "steering", "exactly one of"),
        ({"alpha": 1, "beta": 1}, "steering", "exactly one of"),
        ({"beta": 1, "weights": {"sql": 1}}, "steering", "exactly one of"),
        ({"weights": {"nope": 1}}, "steering.weights", "no steering pair 'nope'; it has: sql, more, stay"),
        ({"weights": {}}, "steering.weights", ""),
        ({"weights": {"sql": "x"}}, "steering.weights.sql", ""),
        ({"beta": 3.5}, "steering", "from 0 to 3, not 3.5"),
        ({"weights": {"sql": -1}}, "steering", "from 0 to 2, not -1"),
        ({"gamma": 1}, "steering.gamma", ""),
        (1.0, "steering", ""),
    ],
)
def test_refusals_name_the_field(wish: Any, param: str, words: str) -> None:
    error = assert_openai_error(ask(engine_of(), prompt="hi", steering=wish), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_values_that_are_not_finite_are_refused() -> None:
    client = AsgiClient(create_app(engine_of(), ApiSettings(), Metrics()))
    for word in ("NaN", "Infinity", "1e999"):
        content = f'{{"model": "fake", "prompt": "hi", "steering": {{"beta": {word}}}}}'.encode()
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_a_model_without_pairs_cannot_be_steered() -> None:
    engine = engine_of()
    error = assert_openai_error(ask(engine, model="plain", prompt="hi", steering={"alpha": 1}), 400)
    assert "'plain' is not steered" in error["message"]
    assert submitted(engine, model="plain", prompt="hi").steering == SteeringParams()


def test_members_read_conversations_in_their_own_way() -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    request = submitted(engine_of(), messages=messages, max_tokens=3)
    expert, anti, itself = map(text_of, request.steering.prompts)
    assert expert == "<system>be<user>hiAns:"
    assert anti == text_of(request.prompt_ids)
    assert itself == anti.replace("be", "other")
    assert itself != anti


def test_an_empty_prompt_leaves_the_system_message_out() -> None:
    engine = engine_of((PAIRS[2],), (PromptView(), PromptView(), PromptView(prompt="")))
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}]
    request = submitted(engine, messages=messages, max_tokens=3)
    plain = submitted(engine, model="plain", messages=messages[1:], max_tokens=3)
    assert request.steering.prompts[2] == plain.prompt_ids


@pytest.mark.parametrize("as_ids", [False, True])
def test_members_read_completions_in_their_own_way(as_ids: bool) -> None:
    prompt: Any = list(b"hi there") if as_ids else "hi there"
    request = submitted(engine_of(), prompt=prompt)
    assert [*map(text_of, request.steering.prompts)] == ["<user>hi thereAns:", "hi there", "other"]
    engine = engine_of((PAIRS[2],), (PromptView(), PromptView(), PromptView(prompt="")))
    assert text_of(submitted(engine, prompt=prompt).steering.prompts[2]) == "e"


def test_members_that_do_not_run_have_no_say() -> None:
    """Nothing of them is rendered or counted: the answer may fill the target's own context."""
    long = PromptView(prefix="x" * 600)
    engine = engine_of((PAIRS[0],), (long, PromptView()))
    assert_openai_error(ask(engine, prompt="hi"), 400)
    off = submitted(engine, prompt="hi", max_tokens=509, steering={"alpha": 0})
    assert off.steering.prompts == ()


def test_an_answer_without_a_limit_fits_behind_the_longest_prompt() -> None:
    engine = engine_of((PAIRS[0],), (PromptView(prefix="x" * 100), PromptView()))
    messages = [{"role": "user", "content": "hi"}]
    request = submitted(engine, messages=messages)
    assert request.sampling.max_tokens == 512 - len(request.prompt_ids) - 100
