"""SquareHead against its formula in float64, its gradient by finite differences, and which states it is over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_job import CPU, opened_models, small_recipe, text
from transformers import AutoModelForCausalLM

from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.losses import SQUARE_HEAD_EPS, square_head


def states(rows: int = 5, layers: int = 3, hidden: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = (0.01, 1.0, 30.0)
    return [
        scales[i] * torch.randn(rows, hidden, generator=generator, dtype=torch.float64) for i in range(layers)
    ]


def test_each_layer_is_one_ratio_of_means_over_positions_and_channels() -> None:
    ours, theirs = states(seed=1), states(seed=2)
    expected = []
    for s, t in zip(ours, theirs, strict=True):
        pairs = list(zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
        error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        size = sum(b**2 for _, b in pairs) / len(pairs)
        expected.append(error / (size + 2.0**-7))
    assert SQUARE_HEAD_EPS == 2.0**-7
    assert square_head(ours, theirs).tolist() == pytest.approx(expected, rel=1e-12)
    assert square_head(theirs, theirs).tolist() == [0.0, 0.0, 0.0]
    # eps decides where a layer's states are small: without it this ratio would be hundreds.
    assert square_head(ours[:1], [theirs[0] * 1e-3]).item() < 0.1


def test_its_gradient_is_that_of_finite_differences() -> None:
    ours, theirs = states(rows=3, seed=3), states(rows=3, seed=4)
    for own in ours:
        own.requires_grad_()
    assert torch.autograd.gradcheck(lambda *s: square_head(s, theirs).sum(), tuple(ours))


def test_parts_of_a_batch_sum_to_the_whole() -> None:
    ours, theirs = states(rows=7, seed=5), states(rows=7, seed=6)
    mean_squares = torch.stack([t.square().mean() for t in theirs])
    parts = [
        square_head([s[part] for s in ours], [t[part] for t in theirs], rows=7, mean_squares=mean_squares)
        for part in (slice(0, 2), slice(2, 7))
    ]
    assert torch.allclose(sum(parts), square_head(ours, theirs), rtol=1e-12)  # type: ignore[arg-type]
    # One ratio per part and their mean is something else.
    assert not torch.allclose(
        square_head([s[:2] for s in ours], [t[:2] for t in theirs]) * 2 / 7
        + square_head([s[2:] for s in ours], [t[2:] for t in theirs]) * 5 / 7,
        square_head(ours, theirs),
        rtol=1e-3,
    )


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_states_are_those_of_transformers_without_the_embedding(
    tiny_checkpoint: Any, tiny_student: Any, arch: str
) -> None:
    """``hidden_states[1:]``: raw block outputs and, last, the one after the final norm; padding is left out."""
    parent: Path = tiny_checkpoint(arch)
    _, teacher, _ = opened_models(tiny_student(arch=arch), parent, small_recipe())
    oracle = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, attn_implementation="eager")
    sequences = sorted(text(5, seed=2), key=lambda s: len(s.tokens))
    batch = make_batch(sequences, CPU, answers_only=True)
    ours = teacher(batch)
    assert batch.place.width > min(len(s.tokens) for s in sequences)
    start = 0
    for sequence in sequences:
        end = start + len(sequence.tokens)
        with torch.no_grad():
            theirs = oracle(torch.tensor([sequence.tokens]), output_hidden_states=True).hidden_states[1:]
        assert len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            assert torch.allclose(own[start:end], other[0], atol=2e-4, rtol=1e-3)
        start = end
    assert start == batch.rows


def test_sequences_of_similar_length_share_a_forward() -> None:
    sequences = text(9)
    groups = grouped(sequences, 40)
    assert sorted(s.tokens for group in groups for s in group) == sorted(s.tokens for s in sequences)
    assert all(sum(len(s.tokens) for s in group) <= 40 for group in groups)
    lengths = [len(s.tokens) for group in groups for s in group]
    assert lengths == sorted(lengths)
