"""Sparse students served over HTTP by Triton's interpreter: every kernel of ``kernels/gpu``, the tokens of torch.

The first student goes by the shipped table of dispatch; the second by one such as a GPU's, which splits the inputs of
narrow products among programs and expands the weight for prompts that are shorter than the shipped one says.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from engines import spec
from live_server import serve_in_thread
from native_kernels import require_native
from sparse_students import write_tiny_student

from paceline.clients import console
from paceline.kernels import dispatch, ops, reference_sampling
from paceline.kernels.formats import ValueDtype
from paceline.kernels.gpu import runtime, table
from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig
from paceline.server.config.schema import SteeringConfig
from paceline.server.engine.build import build_engine
from paceline.server.engine.kernel_runner import KernelRunner
from paceline.server.metrics import Metrics

pytest.importorskip("triton")

NO_DRAFT = {"extra_body": {"speculation": {"enabled": False}}}
#: More tokens than the shipped table multiplies sparse.
LONG_PROMPT = "the sea " * 12
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalty": {"temperature": 0, "frequency_penalty": 1.5},
    "greedy, no draft": {"temperature": 0, **NO_DRAFT},
    "seeded": {"temperature": 0.8, "seed": 7},
    "seeded, top_p": {"temperature": 1.3, "top_p": 0.9, "seed": 8},
    "long prompt": {"temperature": 0, "prompt": LONG_PROMPT, "max_tokens": 1},
}
#: One token of a prompt, then one per step: no product ever has more than a row.
SINGLE_ROWS: dict[str, Any] = {"prompt": "s", "max_tokens": 4, "temperature": 0, **NO_DRAFT}
#: Of the draft for three levers at once.
TRAINING = (
    "--init layers:0 --max-steps 24 --round-prompts 8 --answer-tokens 12 --batch-tokens 60 --held-out 2 "
    "--eval-tokens 8 --eval-rounds 8 --streams 8 --threads 1 --precision fp32"
)
#: For the second student. 8 programs are more than its narrowest product has rows of tiles.
TABLE = {
    "device": "cpu",
    "format": "16:32-fp32",
    "shape": "*",
    "max_sparse_rows": 16,
    "gemv": {"num_warps": 4, "num_stages": 1, "programs": 8},
    "gemm": {"num_warps": 4, "num_stages": 1, "programs": 8},
}


def every_kernel() -> set[str]:
    """Names of all kernels that there are, as their launches are counted."""
    sources = [path.read_text("utf-8") for path in Path(str(runtime.__file__)).parent.glob("*.py")]
    return {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> list[Any]:
    """Students of small parents, drafted for by these. The second's down projection is three tiles wide."""
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("students")
    kinds: dict[str, tuple[str, ValueDtype, int]] = {
        "bitmask": ("unstructured", "int8", 64),
        "n-m": ("16:32", "fp32", 160),
    }
    made = []
    for name, (pattern, dtype, width) in kinds.items():
        parent = tiny_checkpoint("llama", intermediate_size=width, **small)
        student = write_tiny_student(folder / name, parent, pattern=pattern, dtype=dtype)
        made.append(replace(spec(student, name, draft=parent), weights="fp32"))
    return made


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second student's table, where a machine's own one is looked for."""
    path = tmp_path / "kernel-table.json"
    path.write_text(json.dumps({"entries": [TABLE]}))
    monkeypatch.setenv("PACELINE_KERNEL_TABLE", str(path))
    table.find.cache_clear()
    yield
    table.find.cache_clear()


@contextmanager
def served(models: list[Any], kernels: str) -> Iterator[openai.OpenAI]:
    config = PacelineConfig(
        engine=EngineConfig(device="cpu", threads=1, kv_cache_gib=4 / 1024, block_size=16),
        models=tuple(models),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PACELINE_KERNELS", kernels)
        metrics = Metrics()
        engine = build_engine(config, metrics)
        app = create_app(engine, ApiSettings(), metrics)
        with (
            serve_in_thread(app, startup=engine.start, shutdown=engine.stop) as url,
            openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120) as client,
        ):
            yield client


def texts(client: openai.OpenAI, model: str) -> dict[str, str]:
    """What the requests get; of the second model, whose linears alone are others, those of one row and the seeded."""
    asked = ASKED if model == "bitmask" else {"single rows": SINGLE_ROWS, "seeded": ASKED["seeded"]}
    return {name: ask(client, model, **fields) for name, fields in asked.items()}


def ask(client: openai.OpenAI, model: str, **fields: Any) -> str:
    answer = client.completions.create(**{"model": model, "prompt": "the sea", "max_tokens": 6, **fields})
    return str(answer.choices[0].text)


def accepted(client: openai.OpenAI) -> float:
    """Draft tokens that the server has accepted so far."""
    page = httpx.get(str(client.base_url.join("/metrics"))).text
    found = re.findall(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (.+)$", page, re.MULTILINE)
    return sum(map(float, found))


def launched() -> set[str]:
    return {name for name, count in runtime.launches().items() if count}


@pytest.fixture(scope="module")
def expected(models: list[Any]) -> dict[str, dict[str, str]]:
    """The same requests on torch, whose sparse linears are dense ones."""
    with served(models, "torch") as client:
        return {model.name: texts(client, model.name) for model in models}


def test_served_by_triton_with_the_tokens_of_torch(
    models: list[Any], expected: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = _verify_beside_the_reference(monkeypatch)
    runtime.forget_launches()
    with served(models, "triton") as client:
        for model in models:
            assert texts(client, model.name) == expected[model.name]
        ask(client, "bitmask", temperature=1.0, top_p=0.95)
    assert any(checked), "no draft token was verified by chance"
    assert launched() == every_kernel()


def test_the_table_and_the_rows_decide_which_kernels_multiply(models: list[Any]) -> None:
    products = {"gemv_kernel", "gemm_kernel", "add_splits_kernel", "expand_kernel"}
    # No prompt begins as another does: what the KV cache has of it needs no product.
    short, middle = {"max_tokens": 1}, {"prompt": "a sail " * 3, "max_tokens": 1}
    asked: list[tuple[str, dict[str, Any], set[str]]] = [
        ("bitmask", SINGLE_ROWS, {"gemv_kernel"}),
        ("bitmask", middle, {"gemm_kernel"}),
        ("bitmask", ASKED["long prompt"], {"expand_kernel"}),
        ("n-m", SINGLE_ROWS, {"gemv_kernel", "add_splits_kernel"}),
        ("n-m", short, {"gemm_kernel", "add_splits_kernel"}),
        ("n-m", middle, {"expand_kernel"}),
    ]
    with served(models, "triton") as client:
        for model, fields, wanted in asked:
            runtime.forget_launches()
            ask(client, model, **fields)
            assert launched() & products == wanted, (model, fields)


@pytest.fixture
def distilled(models: list[Any], tmp_path: Path) -> Path:
    """A draft that ``train-draft`` makes for the first student."""
    require_native()
    words = ["one", "two three", "four", "on the sea", "here", "there it is", "is it", "at once"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    command = ["train-draft", models[0].target, "--prompts", str(text), "-o", str(tmp_path / "run")]
    assert console.main([*command, *TRAINING.split()]) == 0
    return tmp_path / "run" / "best"


def test_a_sparse_steered_model_with_a_distilled_draft_combines_by_the_kernel(
    models: list[Any], distilled: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three levers in one configuration: the text of torch, and every combination is a launch of the kernel."""
    expert, anti = (tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, perturb=p) for p in (0.0, 0.4))
    pair = SteeringConfig("p", str(anti), expert=str(expert), alpha=1.4)
    speculation = replace(models[0].speculation, draft=str(distilled))
    steered = replace(models[0], speculation=speculation, steering=(pair,))
    combined: list[int] = []
    real = KernelRunner.combine

    def counted(self: Any, members: Any, weights: torch.Tensor) -> torch.Tensor:
        before = runtime.launches().get("combine_kernel", 0)
        result = real(self, members, weights)
        combined.append(runtime.launches().get("combine_kernel", 0) - before)
        return result

    monkeypatch.setattr(KernelRunner, "combine", counted)
    asked: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0, "extra_body": {"speculation": {"draft": "expert"}}},
        {"temperature": 0, "extra_body": {"steering": {"alpha": 0}}},
    ]
    with served([steered], "torch") as client:
        expected = [ask(client, "bitmask", **fields) for fields in asked]
    with served([steered], "triton") as client:
        assert [ask(client, "bitmask", **fields) for fields in asked] == expected
        assert accepted(client) > 0
    assert expected[0] != expected[3]
    assert len(combined) > 6
    assert set(combined) == {1}


def _verify_beside_the_reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every verification by the kernels is repeated by the reference; returns the lengths of blocks as they come."""
    real, lengths_seen = ops.verify, []

    def both(*args: torch.Tensor, by_block: bool) -> tuple[torch.Tensor, torch.Tensor]:
        got = real(*args, by_block=by_block)
        wanted = reference_sampling.verify(*args, by_block=by_block)
        assert all(map(torch.equal, got, wanted))
        lengths_seen.extend(args[3].tolist())
        return got

    monkeypatch.setattr(ops, "verify", both)
    return lengths_seen


def test_paceline_info_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_KERNELS", "triton")
    told = {(c.op, c.format): c.words for c in dispatch.explain("cpu")}
    for pair in (("sparse_linear", "int8"), ("verify", "fp32"), ("combine", "fp32")):
        assert told[pair] == "triton (interpreter)"
    monkeypatch.setenv("PACELINE_KERNELS", "torch")
    told = {(c.op, c.format): c.words for c in dispatch.explain("cpu")}
    assert told["sparse_linear", "int8"] == "dense torch (triton: PACELINE_KERNELS is not triton)"
    assert told["verify", "fp32"].startswith("reference")
