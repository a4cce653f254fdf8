"""Real weights: what ``--weights auto`` serves meets the quality bar, and a coarser quantization does not.

The text is the built-in one, the same by which ``auto`` decides.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from native_kernels import require_native
from real_models import QWEN_CODER, SMOLLM2

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.models.auto_weights import calibration_windows
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config
from paceline.server.models.packer import Packer
from paceline.server.models.plan import PlanBuilder
from paceline.server.models.quality import MAX_KL_NATS, MAX_PERPLEXITY_CHANGE, Judge
from paceline.server.models.tensors import CheckedTensors

pytestmark = pytest.mark.real

#: Windows of 512 tokens: enough for SmolLM2; the larger model is four times as slow and three times better.
WINDOWS = {SMOLLM2: 8, QWEN_CODER: 2}


class Quiet:
    """No progress."""

    def task(self, label: str, total_bytes: int) -> Any:
        return nullcontext(lambda done: None)


def packer_of(path: Path) -> Packer:
    checkpoint = open_checkpoint(path)
    config = parse_model_config(checkpoint.hf_config)
    return Packer(checkpoint, config, Pool(2), Quiet(), checkpoint.weights_sha256())


def coarse(packer: Packer, bits: int) -> DecoderPlan:
    """int8 whose weights have been rounded to ``bits`` per output row first."""
    tensors, levels = CheckedTensors(packer.checkpoint, packer.config), 2 ** (bits - 1) - 1

    def rounded(name: str) -> torch.Tensor:
        weight: torch.Tensor = tensors(name)
        if weight.dim() != 2 or "embed" in name:
            return weight
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / levels
        coarser: torch.Tensor = (weight / scale).round() * scale
        return coarser

    return PlanBuilder(packer.config, rounded, packer.pool, "int8").build()


@pytest.mark.parametrize("name", [SMOLLM2, QWEN_CODER])
def test_int8_meets_the_bar_and_six_bits_do_not(
    name: str, real_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    path = real_model(name)
    packer = packer_of(path)
    windows = calibration_windows(packer)[: WINDOWS[name]]
    judge = Judge(packer.plan("fp32"), windows, packer.pool)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))  # quantized here and now, not by an earlier version
    int8 = judge.measure(packer.plan("int8"))
    worse = judge.measure(coarse(packer, 6), windows=1)
    print(f"{name}: int8 {int8}; rounded to 6 bits {worse}")  # noqa: T201
    assert int8.positions > 1000
    assert int8.kl_nats <= MAX_KL_NATS
    assert abs(int8.perplexity_change) <= MAX_PERPLEXITY_CHANGE
    assert int8.good
    assert int8.top1_agreement > 0.9
    assert math.isfinite(worse.kl_nats)
    assert not worse.good
    assert worse.kl_nats > 3 * int8.kl_nats
