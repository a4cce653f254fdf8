"""The draft that comes with Paceline: served without being asked for, exact, and useful on the real target."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_models import SMOLLM2
from served_process import PATIENCE_SECONDS, ServedProcess, paceline_serve

from paceline.server.models.bundled import bundled, bundled_draft
from paceline.server.models.manifest import read_manifest

pytestmark = pytest.mark.real

NAME = "smollm2-135m-draft"
#: None is among the prompts that the draft was made or measured with.
QUESTIONS = [
    "Why do leaves change their colour in autumn?",
    "Write a short letter to a friend about a walk by the sea.",
    "A train leaves at 9:40 and arrives at 12:15. How long does the journey take?",
]
MOST_BYTES = 20 * 1000 * 1000


@pytest.fixture(scope="module")
def served(
    real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedProcess]:
    real_model(SMOLLM2)
    with paceline_serve(tmp_path_factory.mktemp("served"), SMOLLM2) as process:
        yield process


def ask(served: ServedProcess, question: str, **fields: Any) -> dict[str, Any]:
    body = {
        "model": SMOLLM2,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 160,
        **fields,
    }
    reply = httpx.post(served.url + "/v1/chat/completions", json=body, timeout=PATIENCE_SECONDS)
    reply.raise_for_status()
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_a_server_without_flags_speculates_and_says_the_same(
    served: ServedProcess, sampling: dict[str, Any]
) -> None:
    drafted = accepted = 0
    for question in QUESTIONS:
        plain = ask(served, question, **sampling, speculation={"enabled": False})
        # Few at a time: how long blocks are is the policy's choice, by what steps cost on this machine today.
        quick = ask(served, question, **sampling, speculation={"draft": NAME, "max_draft_tokens": 2})
        assert quick["choices"][0]["message"] == plain["choices"][0]["message"]
        figures = quick["metrics"]["speculative_decoding"]
        drafted += figures["num_draft_tokens"]
        accepted += figures["num_accepted_draft_tokens"]
    assert drafted > 30
    assert accepted / drafted > 0.15, (accepted, drafted)


def test_it_is_this_targets_and_small_and_measured(real_model: Callable[[str], Path]) -> None:
    folder, manifest = bundled()[NAME], read_manifest(bundled()[NAME])
    assert manifest is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
    assert manifest.base.weights_sha256 is not None
    assert bundled_draft(manifest.base.weights_sha256) == NAME
    by_temperature = {f["temperature"]: f for f in manifest.measured if f["dataset"] == "paceline-chat"}
    assert by_temperature[0.0]["tau"] > by_temperature[1.0]["tau"] > 1.2
    assert "paceline train-draft" in (folder / "README.md").read_text()
