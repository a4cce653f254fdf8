"""SmolLM2 served by vLLM on the CPU through our API, without a draft and with one: text, streams, figures, its end."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from real_models import SMOLLM2
from served_process import PATIENCE_SECONDS, ServedProcess
from vllm_process import vllm_python, vllm_serve

from paceline.draftmodels.cut import cut_draft
from paceline.server.models.standalone import plain_folder

pytestmark = pytest.mark.real

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def target(real_model: Callable[[str], Path]) -> Path:
    vllm_python()
    return plain_folder(real_model(SMOLLM2))


def config(target: Path, draft: str) -> str:
    return (
        "[engine]\nkind = 'vllm'\nkv_cache_gib = 0.5\nmax_running = 8\n"
        "[engine.vllm]\nmax_model_len = 1024\nenforce_eager = true\n"
        f"[[models]]\nname = 'smol'\ntarget = {str(target)!r}\n"
        f"[models.speculation]\ndraft = {draft!r}\nmax_draft_tokens = 3\n"
    )


@pytest.fixture(scope="module")
def served(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    with vllm_serve(tmp_path_factory.mktemp("vllm"), config(target, "none")) as process:
        yield process


@pytest.fixture
def client(served: ServedProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=served.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_SECONDS
    ) as made:
        yield made


def test_greedy_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert len(chunks) > 5
    stopped = client.chat.completions.create(**asked, stop=["Paris"])
    assert stopped.choices[0].message.content == "The capital of France is "


def test_logprobs_of_answer_and_prompt(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="smol", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content or []
    assert len(entries) == 6
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)  # greedy
    assert all(len(entry.top_logprobs) == 2 and entry.logprob < 0 for entry in entries)
    scored = client.completions.create(model="smol", prompt="The sky is", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "The sky is"
    assert scored.choices[0].logprobs is not None
    values = scored.choices[0].logprobs.token_logprobs or []
    assert values[0] is None
    assert [value < 0 for value in values[1:] if value is not None] == [True, True]


def test_a_seed_gives_the_same_choices_again(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="smol", messages=QUESTION, temperature=1, seed=7, n=3, max_tokens=12
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 1


def test_what_only_the_native_engine_does_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="native engine"):
        client.completions.create(
            model="smol", prompt="a", max_tokens=1, extra_body={"speculation": {"lenience": 0.5}}
        )


def test_metrics_carry_each_name_once(served: ServedProcess) -> None:
    text = httpx.get(served.url + "/metrics").text
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(typed) == len(set(typed))
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert samples["vllm:generation_tokens_total"] > 0
    assert samples["vllm:prompt_tokens_total"] > 0
    assert "vllm:cache_config_info" in samples  # vLLM's own
    assert "paceline:spec_disabled_total" not in samples  # it has no draft
    assert not any(name.startswith("python_") for name in samples)


def test_a_dead_engine_core_ends_streams_and_server(served: ServedProcess) -> None:
    asked = {"model": "smol", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    killed, last = False, ""
    with httpx.stream("POST", served.url + "/v1/completions", json=asked, timeout=PATIENCE_SECONDS) as answer:
        for line in answer.iter_lines():
            last = line or last
            if not killed:
                killed = True
                children = psutil.Process(served.child.pid).children()
                (core,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
                core.kill()
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert served.ends() == 1


def test_an_independent_draft_changes_no_greedy_text(target: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    cut_draft(str(target), (0, 1, 28, 29), draft)
    with vllm_serve(tmp_path, config(target, str(draft))) as process:
        asked = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 32}
        answer = httpx.post(process.url + "/v1/chat/completions", json=asked, timeout=PATIENCE_SECONDS).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        assert answer["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0
        sampled = httpx.post(process.url + "/v1/chat/completions", json=asked | {"temperature": 1})
        assert sampled.status_code == 400  # vLLM would answer noise
        process.drained()
        assert process.ends() == 0
