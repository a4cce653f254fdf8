"""What was pruned stays pruned: weights, gradients and moments, whatever the optimiser does; rounding; packing."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_job import make_trainer, opened_models, small_recipe
from torch import Tensor, nn

from paceline.draftmodels.jobs.checkpoint import training_tensors
from paceline.draftmodels.jobs.optim import set_rate
from paceline.draftmodels.sparse_finetune.export import sparse_weight
from paceline.draftmodels.sparse_finetune.masks import FixedMasks, rounded_rows
from paceline.draftmodels.sparse_finetune.opening import open_student
from paceline.kernels.formats import Pattern
from paceline.server.errors import ArtifactError


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_mask_holds_through_training(
    tiny_student: Any, parent: Path, tmp_path: Path, pattern: str
) -> None:
    student = tiny_student(pattern)
    kept = open_student(str(student)).kept
    recipe = small_recipe(weight_decay=0.1, qat_steps=3, w_kl=0.5)
    seen: list[int] = []

    def check() -> None:
        for name, mask in kept.items():
            weight = trainer.parameters[name]
            assert not weight.detach()[~mask].any(), name
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not trainer.optimizer.state[weight][moment][~mask].any(), name
            assert trainer.optimizer.state[weight]["exp_avg"][mask].any(), name
        seen.append(trainer.state.step)

    class Shown:
        def step(self, *_: Any) -> None:
            check()

        def note(self, text: str) -> None: ...

    trainer, _ = make_trainer(student, parent, tmp_path / "run", recipe, shown=Shown())  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.train()
    assert seen == list(range(1, 9))
    assert all(not torch.equal(before[name], trainer.parameters[name]) for name in before)


def test_embedding_and_head_are_frozen_unless_asked_for(student: Path, parent: Path) -> None:
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    frozen, _, _ = opened_models(student, parent, small_recipe())
    trained, _, _ = opened_models(student, parent, small_recipe(train_embedding=True))
    assert names & set(frozen.trained()) == set()
    assert set(trained.trained()) - set(frozen.trained()) == names
    assert "model.norm.weight" in frozen.trained()


def masks_of(*shape: int) -> tuple[nn.Parameter, FixedMasks, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(*shape, generator=generator) < 0.5
    weight = nn.Parameter(torch.randn(*shape, generator=generator) * kept)
    return weight, FixedMasks({"x.weight": weight}, {"x.weight": kept}), kept


def test_rounded_weights_are_those_that_are_exported() -> None:
    weight, masks, kept = masks_of(6, 16)
    exact = weight.detach().clone()
    exported = sparse_weight(exact, kept, Pattern(), int8=True)
    with masks.rounded():
        assert torch.equal(weight.detach(), exported.to_dense())
        assert not torch.equal(weight.detach(), exact)
        weight.square().sum().backward()
    assert torch.equal(weight.detach(), exact)
    # Straight through: the gradient of the rounded weight is left on the exact one.
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * rounded_rows(exact))
    assert exported.value_dtype == "int8"
    assert torch.equal(exported.kept(), kept)


def test_exact_weights_come_back_after_an_error() -> None:
    weight, masks, _ = masks_of(2, 8)
    exact = weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), masks.rounded():
        raise KeyboardInterrupt
    assert torch.equal(weight.detach(), exact)


def test_checkpoints_hold_kept_values_only() -> None:
    weight, masks, kept = masks_of(4, 8)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    masks.mask_gradients()
    optimizer.step()
    masks.apply()
    tensors = training_tensors({"x.weight": weight}, optimizer)
    packed = masks.packed(tensors)
    count = int(kept.sum())
    assert {name: tuple(t.shape) for name, t in packed.items()} == {
        "x.weight": (count,),
        "x.weight@step": (),
        "x.weight@exp_avg": (count,),
        "x.weight@exp_avg_sq": (count,),
    }
    unpacked = masks.unpacked(packed)
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in tensors.items())
    _, other, _ = masks_of(4, 16)
    with pytest.raises(ArtifactError, match="of another mask"):
        other.unpacked(packed)


def rounded_loss(seed: int, *, through: bool) -> float:
    """Loss of rounded weights after training a linear whose rows have one large weight: rounding steps are coarse."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 6, generator=generator) @ torch.randn(6, 16, generator=generator)
    x[:, 0] = 0.0
    wanted = x @ torch.randn(16, 4, generator=generator)
    kept = torch.rand(4, 16, generator=generator) < 0.7
    kept[:, 0] = True
    start = torch.randn(4, 16, generator=generator)
    start[:, 0] = 60.0
    weight = nn.Parameter(start * kept)
    masks = FixedMasks({"x.weight": weight}, {"x.weight": kept})
    optimizer = torch.optim.AdamW([weight], weight_decay=0.0)
    for step in range(300):
        set_rate(optimizer, 0.05 * (1 - step / 300))
        optimizer.zero_grad()
        with masks.rounded() if through and step >= 150 else nullcontext():
            (x @ weight.T - wanted).square().mean().backward()
        masks.mask_gradients()
        optimizer.step()
        masks.apply()
    with masks.rounded(), torch.no_grad():
        return float((x @ weight.T - wanted).square().mean())


def test_training_through_the_rounding_helps_the_rounded_weights() -> None:
    exact, through = (sum(rounded_loss(seed, through=own) for seed in range(5)) for own in (False, True))
    assert through < 0.9 * exact
