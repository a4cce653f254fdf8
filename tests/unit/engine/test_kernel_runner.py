"""The torch runner whose tokens the kernels choose: by them alone, and the tokens that torch chooses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import request, run, spec, tiny_engine, tokens
from native_kernels import pool, require_native

from paceline.kernels.cpu.verification import SampledBlock, verify_sampled
from paceline.kernels.gpu import runtime
from paceline.server.decoding import verify as rules
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine import engine as engine_module
from paceline.server.engine.kernel_runner import KernelRunner
from paceline.server.engine.request import SpeculationParams

pytest.importorskip("triton")

PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.6, "seed": -4},
    {"temperature": 1e-40, "seed": 5},
]
PROCESSED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logit_bias": {9: 4.0}},
    {"temperature": 0.9, "seed": 3, "top_k": 5},
    {"temperature": 1.2, "seed": 7, "presence_penalty": 1.0},
]


def ask(many: list[dict[str, Any]]) -> list[Any]:
    return [request([5, 6, 7 + i], max_tokens=5, **one) for i, one in enumerate(many)]


@pytest.fixture
def drafted(target: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``drafted(kernels)`` -> an engine whose target is drafted for by a model like it."""
    draft = tiny_checkpoint("llama", perturb=0.05)

    def make(kernels: str) -> Any:
        monkeypatch.setenv("PACELINE_KERNELS", kernels)
        runtime.forget_launches()
        return tiny_engine(spec(target, draft=draft))

    return make


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("torch was to have no part in it")


def test_plain_rows_need_neither_processing_nor_torch(drafted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(drafted("torch"), *ask(PLAIN))
    engine = drafted("triton")
    monkeypatch.setattr(engine_module, "process", refuse)
    monkeypatch.setattr(rules, "draw", refuse)
    assert tokens(engine, *ask(PLAIN)) == wanted
    assert set(runtime.launches()) == {"combine_kernel", "perturb_kernel", "pick_kernel"}


def test_processed_rows_are_drawn_by_the_kernels_too(drafted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tokens(drafted("torch"), *ask(PROCESSED + PLAIN))
    engine = drafted("triton")
    monkeypatch.setattr(rules, "draw", refuse)
    unseeded = request([1, 2], max_tokens=5, temperature=1.0)
    got = run(engine, *ask(PROCESSED + PLAIN), unseeded)
    assert [[t for event in choice[0] for t in event.token_ids] for choice in got[:-1]] == wanted
    assert runtime.launches()["draw_kernel"] > 0


def test_lenient_greedy_requests_stay_lenient(
    target: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tiny_checkpoint("llama", perturb=0.2)
    loose = SpeculationParams(lenience=0.05)
    texts = {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("PACELINE_KERNELS", kernels)
        engine = tiny_engine(spec(target, draft=draft, min_lenience=0.01, lenience_form="lin"))
        texts[kernels] = tokens(
            engine, *(request([5, 6, 7], max_tokens=8, speculation=s) for s in (loose, None))
        )
    assert texts["torch"] == texts["triton"]
    assert texts["torch"][0] != texts["torch"][1]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_ragged_blocks_are_verified_as_by_the_native_kernel(drafted: Any, rule: Any) -> None:
    require_native()
    runner = drafted("triton")._models["m"].runner
    assert isinstance(runner, KernelRunner)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(40, 30, generator=generator)
    seen: set[int] = set()
    for _ in range(8):
        blocks = [
            DraftBlock(()),
            _drafted(scores[1:5], torch.arange(30), generator),
            DraftBlock((3, 4)),
            _drafted(scores[8:10], torch.tensor([2, 5, 11, 29]), generator, restricted=True),
            _drafted(scores[11:14], torch.arange(20), generator),
        ]
        first_rows = [0, 1, 5, 8, 11]
        uniforms = torch.rand(1 + 5 + 3 + 3 + 4, dtype=torch.float64, generator=generator)
        got = runner.verify_sampled(scores, first_rows, blocks, uniforms, rule)
        sampled = [
            SampledBlock(row, block.token_ids, block.probs, block.columns)
            for row, block in zip(first_rows, blocks, strict=True)
        ]
        assert got == verify_sampled(
            scores, sampled, uniforms, by_block=rule == "block", pool=pool("portable")
        )
        seen.update(accepted for accepted, _ in got)
    assert {0, 1, 3, 4} <= seen  # refused at once, somewhere, and accepted whole


def _drafted(
    scores: torch.Tensor, columns: torch.Tensor, generator: torch.Generator, *, restricted: bool = False
) -> DraftBlock:
    """Tokens drawn from a distribution near the target's over some ids."""
    own = scores[:, columns] + torch.randn(len(scores), len(columns), generator=generator)
    probs = own.softmax(-1)
    drawn = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return DraftBlock(tuple(columns[drawn].tolist()), probs, columns if restricted else None)
