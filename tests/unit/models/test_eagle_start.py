"""The row that vLLM leaves out: the correction of ``fc``, on states of which the first of a text is unlike others."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import write_feature_draft
from torch import Tensor

from paceline.server.models import eagle_start
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import FC
from paceline.server.models.eagle_start import corrected_fc, correction
from paceline.server.models.native_form import NativeCheckpoint

HIDDEN = 32


def random_rows(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fc``, and of 8 texts that begin alike: our first rows, vLLM's first rows, and 400 other states."""
    fc = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator)
    embedding, second, state = (torch.randn(HIDDEN, generator=generator) for _ in range(3))
    others = torch.randn(400, HIDDEN, generator=generator)
    others[:, 8:] *= 0.01  # they fill a part of the space; the first state lies mostly outside of it
    native = torch.cat((embedding * 0.1, torch.zeros(HIDDEN))).expand(8, -1)
    first = torch.cat(
        (second.expand(8, -1), state + 0.01 * torch.randn(8, HIDDEN, generator=generator)), dim=1
    )
    return fc, native, first, others


def test_vllms_first_row_becomes_ours_and_the_others_stay() -> None:
    fc, native, first, others = random_rows(torch.Generator().manual_seed(0))
    corrected = fc + correction(fc, native, first, others)
    missing = ((native - first) @ fc.T).norm(dim=1).mean()
    assert missing > 5
    assert (native @ fc.T - first @ corrected.T).norm(dim=1).mean() < 0.05 * missing
    joined = torch.cat((torch.zeros_like(others), others), dim=1)
    moved = (joined @ (corrected - fc).T).norm(dim=1).mean()
    assert moved < 0.05 * missing
    assert torch.equal(corrected[:, :HIDDEN], fc[:, :HIDDEN])  # embeddings are read as before


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_target_is_run_for_it_and_a_large_one_is_not(
    arch: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = open_checkpoint(tiny_checkpoint(arch))
    draft = NativeCheckpoint(write_feature_draft(tmp_path / "draft", target.path), target)
    fc = corrected_fc(draft, target)
    change = fc - draft.tensor(FC).float()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 1
    assert torch.isfinite(fc).all()
    monkeypatch.setattr(eagle_start, "_MOST_BYTES", 1000)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(corrected_fc(draft, target), draft.tensor(FC).float())
    assert "accept less" in caplog.text
