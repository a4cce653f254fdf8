"""The dense model drafted for by its own sparse copy, both in int8: the text of the dense model alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import serve_in_thread
from native_kernels import require_native
from real_models import SMOLLM2

from paceline.clients import console
from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig
from paceline.server.engine.build import build_engine
from paceline.server.metrics import Metrics
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.packed_cache import PackedCache

pytestmark = pytest.mark.real

#: Enough text for Wanda to tell loud inputs from quiet ones, and little to compute.
CALIBRATION = [
    "The river runs from the hills to the sea, and on its way it passes three towns and a mill.",
    "Bread is made of flour, water, salt and yeast; it wants an hour to rise and half an hour to bake.",
    "A computer keeps numbers as bits. Eight bits are a byte, and a byte can tell 256 things apart.",
]
QUESTIONS = [
    "Why do ships float?",
    "Write two sentences about a lighthouse.",
    "Count from one to twenty in words, separated by commas.",
    "Give me a recipe for pancakes.",
]
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 4}]


@pytest.fixture(scope="module")
def sparse_copy(
    real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Half of the weights of the linears, by Wanda."""
    require_native()
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "text.txt").write_text("\n\n".join(CALIBRATION))
    where = [str(real_model(SMOLLM2)), "-o", str(folder / "copy"), "--calibration", str(folder / "text.txt")]
    how = "--method wanda --sparsity 0.5 --values int8 --samples 2 --held-out 1 --sequence-tokens 32"
    assert console.main(["sparsify", *where, *how.split()]) == 0
    yield folder / "copy"
    sha256 = NativeCheckpoint(folder / "copy").weights_sha256()
    PackedCache(sha256, "int8").path.unlink(missing_ok=True)  # nobody will start this model again


@pytest.fixture(scope="module")
def url(sparse_copy: Path, real_model: Callable[[str], Path]) -> Iterator[str]:
    """A server of "alone", which has no draft, and of "drafted", the same weights."""
    path = str(real_model(SMOLLM2))
    speculation = SpeculationConfig(draft=str(sparse_copy), policy="fixed", max_draft_tokens=4)
    models = (
        ModelSpec("drafted", path, "int8", None, speculation),
        ModelSpec("alone", path, "int8", None, SpeculationConfig(draft=None)),
    )
    # Neither model finds in the cache what the other has computed.
    settings = EngineConfig(device="cpu", kv_cache_gib=0.25, prefix_caching=False)
    metrics = Metrics()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PACELINE_KERNELS", "native")
        engine = build_engine(PacelineConfig(engine=settings, models=models), metrics)
    app = create_app(engine, ApiSettings(), metrics)
    with serve_in_thread(app, startup=engine.start, shutdown=engine.stop) as url:
        yield url


def ask(url: str, model: str, question: str, sampling: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": 40, **sampling}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    reply.raise_for_status()
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_text_is_that_of_the_dense_model_alone(url: str, sampling: dict[str, Any]) -> None:
    drafted = accepted = 0
    for question in QUESTIONS:
        alone = ask(url, "alone", question, sampling)
        quick = ask(url, "drafted", question, sampling)
        assert quick["choices"] == alone["choices"]
        figures = quick["metrics"]["speculative_decoding"]
        drafted += figures["num_draft_tokens"]
        accepted += figures["num_accepted_draft_tokens"]
        assert "speculative_decoding" not in (alone.get("metrics") or {})
    assert drafted > 100
    assert 0.1 < accepted / drafted < 1
