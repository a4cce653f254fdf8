"""The whole loss and its gradients against transformers and plain autograd; how a step is cut does not show."""

from pathlib import Path
from typing import Any

import pytest
import recovery_job
import torch
from recovery_job import CPU, make_trainer, opened_models, small_recipe, text
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from paceline.draftmodels import losses
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill import order
from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.finetune.objective import Figures, Objective, StepTotals, Teaching
from paceline.draftmodels.jobs.metrics import read_metrics

WEIGHTS = [(1.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.4, 1.3)]


def reference(
    student: Any, teacher: Any, sequences: list[TokenSequence], weights: tuple[float, float, float]
) -> tuple[Tensor, Figures]:
    """The loss as the formula has it, from transformers' outputs, one sequence at a time."""
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    ce, kl = [], []
    for sequence in sequences:
        tokens = torch.tensor([sequence.tokens])
        a = student(tokens, output_hidden_states=True)
        with torch.no_grad():
            b = teacher(tokens, output_hidden_states=True)
        ours.append([states[0] for states in a.hidden_states[1:]])
        theirs.append([states[0] for states in b.hidden_states[1:]])
        learnt = slice(sequence.prompt_tokens - 1, -1)
        log_q, log_p = (out.logits[0, learnt].log_softmax(-1) for out in (a, b))
        ce.append(losses.cross_entropy(log_q, torch.tensor(sequence.answer)))
        kl.append(losses.forward_kl(log_p, log_q))
    joined = [[torch.cat(layer) for layer in zip(*own, strict=True)] for own in (ours, theirs)]
    parts = torch.cat(ce).mean(), torch.cat(kl).mean(), losses.square_head(*joined).sum()
    total = sum((w * part for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
    return total, Figures(*(float(part.detach()) for part in parts))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients_are_those_of_the_formula(
    tiny_checkpoint: Any, tiny_student: Any, weights: tuple[float, float, float]
) -> None:
    parent: Path = tiny_checkpoint("qwen2")  # a tied head: gradients from both of its ends
    recipe = small_recipe(train_embedding=True)
    model, teacher, _ = opened_models(tiny_student(arch="qwen2"), parent, recipe)
    oracles = [
        AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    ]
    oracles[0].load_state_dict(dict(model.state_dict()), strict=False)
    sequences = text(4)
    expected, figures = reference(oracles[0], oracles[1], sequences, weights)
    expected.backward()

    batch = make_batch(sequences, CPU, answers_only=True)
    with torch.no_grad():
        teaching = Teaching(teacher(batch), teacher.head)
    squares = torch.stack([states.square().mean() for states in teaching.states])
    totals = StepTotals(batch.rows, len(batch.learnt), squares)
    objective = Objective(*weights, chunk_rows=5)
    found = objective.backward(batch, model(batch), model.head, teaching, totals)

    for weight, name in zip(weights, ("ce", "kl", "sq"), strict=True):
        if weight:
            assert getattr(found, name) == pytest.approx(getattr(figures, name), rel=2e-4), name
    assert objective.loss(found) == pytest.approx(float(expected.detach()), rel=2e-4)
    theirs = dict(oracles[0].named_parameters())
    for name, parameter in model.trained().items():
        expected_gradient = theirs[name].grad
        if expected_gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        assert parameter.grad is not None, name
        error = (parameter.grad - expected_gradient).norm() / expected_gradient.norm()
        assert error < 1e-3, f"{name}: {error}"


def test_a_step_of_several_forwards_records_the_formula_over_all_of_them(
    student: Path, parent: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(max_steps="1", w_kl=0.5)
    trainer, method = make_trainer(student, parent, tmp_path / "run", recipe)
    oracles = [
        AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    ]
    oracles[0].load_state_dict(dict(method.model.state_dict()))
    lengths = [len(sequence.tokens) for sequence in recovery_job.text()]
    first = order.batches(lengths, recipe.step_tokens, 0, recipe.seed)[0]
    sequences = [recovery_job.text()[i] for i in first]
    assert len(grouped(sequences, recipe.batch_tokens)) > 1
    with torch.no_grad():
        total, figures = reference(oracles[0], oracles[1], sequences, (1.0, 0.5, 1.0))
    trainer.train()
    (line,) = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line)
    assert line["loss"] == pytest.approx(float(total), rel=2e-4)
    for name in ("ce", "kl", "sq"):
        assert line[name] == pytest.approx(getattr(figures, name), rel=2e-4), name


def test_head_gradients_in_float64_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    sequences = [TokenSequence((1, 2, 3, 4, 5, 6), 2)]
    batch = make_batch(sequences, CPU, answers_only=True)
    objective = Objective(0.7, 0.4, 0.0, torch.float64, chunk_rows=3)
    totals = StepTotals(6, 4, torch.zeros(0))

    log_q = F.linear(states[1:5], head).log_softmax(-1)
    log_p = F.linear(teacher[1:5], head.detach()).log_softmax(-1)
    loss = 0.7 * losses.cross_entropy(log_q, torch.tensor([3, 4, 5, 6])).mean()
    loss = loss + 0.4 * losses.forward_kl(log_p, log_q).mean()
    on_states, on_head = torch.autograd.grad(loss, (states, head))
    found = objective.backward(batch, [states], head, Teaching([teacher], head.detach()), totals)
    assert objective.loss(found) == pytest.approx(loss.item(), rel=1e-5)  # logits are made in fp32
    assert states.grad is not None
    assert head.grad is not None
    assert torch.allclose(states.grad, on_states, rtol=1e-4, atol=1e-6)
    assert torch.allclose(head.grad, on_head, rtol=1e-4, atol=1e-6)


def test_prompts_are_learnt_only_if_asked_for() -> None:
    sequences = [TokenSequence((5, 6, 7, 8), 3), TokenSequence((1, 2, 3), 1)]
    answers = make_batch(sequences, CPU, answers_only=True)
    whole = make_batch(sequences, CPU, answers_only=False)
    assert answers.labels.tolist() == [8, 2, 3]
    assert answers.learnt.tolist() == [2, 4, 5]
    assert whole.labels.tolist() == [6, 7, 8, 2, 3]
    assert answers.rows == whole.rows == 7


@pytest.mark.parametrize("changes", [{"accumulate": 1, "batch_tokens": 80}, {"checkpointing": True}])
def test_how_a_step_is_computed_does_not_show(
    student: Path, parent: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Accumulated forwards give the loss and the step of one forward; so does computing activations again."""
    weights = {}
    for name, recipe in (
        ("one", small_recipe(max_steps="3", w_kl=0.5)),
        ("other", small_recipe(max_steps="3", w_kl=0.5, **changes)),
    ):
        trainer, _ = make_trainer(student, parent, tmp_path / name, recipe)
        trainer.train()
        weights[name] = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
    assert torch.allclose(weights["one"], weights["other"], atol=2e-5)


def test_a_part_without_weight_is_not_computed(student: Path, parent: Path, tmp_path: Path) -> None:
    trainer, method = make_trainer(student, parent, tmp_path / "run", small_recipe(w_sq=0.0))
    calls: list[int] = []
    method.teacher.register_forward_hook(lambda *_: calls.append(trainer.state.step))
    trainer.train()
    assert set(calls) == {0}  # held-out text only, which the teacher reads once
