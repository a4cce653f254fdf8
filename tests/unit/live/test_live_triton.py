"""Sparse students served over HTTP by Triton's interpreter: speculation and sampling included, the tokens of torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from engines import spec
from live_server import serve_in_thread
from sparse_students import write_tiny_student

from paceline.kernels import dispatch, ops, reference_sampling
from paceline.kernels.formats import ValueDtype
from paceline.kernels.gpu import runtime
from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.config import EngineConfig, PacelineConfig
from paceline.server.engine.build import build_engine
from paceline.server.metrics import Metrics

pytest.importorskip("triton")

#: Every kernel that a model's requests can reach; the plain number of rows decides between gemv and gemm.
KERNELS = {
    "gemv_kernel",
    "gemm_kernel",
    "combine_kernel",
    "perturb_kernel",
    "pick_kernel",
    "row_stats_kernel",
    "joint_kernel",
    "surplus_kernel",
    "accept_kernel",
    "residual_kernel",
    "draw_kernel",
}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalty": {"temperature": 0, "frequency_penalty": 1.5},
    "greedy, no draft": {"temperature": 0, "extra_body": {"speculation": {"enabled": False}}},
    "seeded": {"temperature": 0.8, "seed": 7},
    "seeded, top_p": {"temperature": 1.3, "top_p": 0.9, "seed": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> list[Any]:
    """Students of one small parent, drafted for by it."""
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    parent = tiny_checkpoint("llama", num_key_value_heads=1, **small)
    folder = tmp_path_factory.mktemp("students")
    kinds: dict[str, tuple[str, ValueDtype]] = {"bitmask": ("unstructured", "int8"), "n-m": ("16:32", "fp32")}
    return [
        replace(
            spec(write_tiny_student(folder / name, parent, pattern=pattern, dtype=dtype), name, draft=parent),
            weights="fp32",
        )
        for name, (pattern, dtype) in kinds.items()
    ]


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
    """What the requests get; of the second model, whose linears alone are others, only the last one."""
    asked = ASKED if model == "bitmask" else {"seeded": ASKED["seeded"]}
    return {
        name: client.completions.create(model=model, prompt="the sea", max_tokens=6, **more).choices[0].text
        for name, more in asked.items()
    }


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
            told = client.completions.create(
                model=model.name, prompt="the sea", max_tokens=6, temperature=1.0, top_p=0.95
            )
            assert told.usage is not None
            assert told.usage.completion_tokens > 0
    assert any(checked), "no draft token was verified by chance"
    counts = runtime.launches()
    assert {name for name, count in counts.items() if count} == KERNELS


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
