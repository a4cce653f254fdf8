"""The chunked objective against plain autograd over everything at once."""

import pytest
import torch
from torch import Tensor

from paceline.draftmodels import losses
from paceline.draftmodels.distill.fused import value_and_gradient
from paceline.draftmodels.distill.objective import Objective, TeacherBatch

VOCAB, HIDDEN, ROWS = 13, 6, 9
STEP_ROWS = [torch.arange(ROWS), torch.arange(1, ROWS)]


def problem(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(outputs of two steps, head, log p restricted to VOCAB of 20 ids, labels)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    outputs = [draw(ROWS, HIDDEN).requires_grad_(), draw(ROWS - 1, HIDDEN).requires_grad_()]
    log_p = (2 * draw(ROWS, 20)).log_softmax(-1)[:, :VOCAB]
    labels = torch.randint(-1, VOCAB, (ROWS,), generator=generator)
    labels[3] = -1
    return outputs, draw(VOCAB, HIDDEN).requires_grad_(), log_p, labels


def at_once(name: str, weights: tuple[float, ...], temperature: float) -> list[Tensor]:
    outputs, head, log_p, labels = problem()
    total = torch.zeros(())
    for output, rows, weight in zip(outputs, STEP_ROWS, weights, strict=True):
        log_q = (output @ head.T / temperature).log_softmax(-1)
        if name == "ce":
            total = total + weight * torch.nn.functional.nll_loss(log_q, labels[rows], ignore_index=-1)
        else:
            total = total + weight * losses.loss_named(name)(log_p[rows], log_q).mean()
    return list(torch.autograd.grad(total, [*outputs, head]))


@pytest.mark.parametrize("name", [*losses.LOSSES, "jsd:0.1", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_gradients_of_the_whole(name: str, temperature: float) -> None:
    outputs, head, log_p, labels = problem()
    objective = Objective(name, temperature, (0.6, 0.4), chunk_elements=4 * VOCAB)
    figures = objective.backward(outputs, head, TeacherBatch(log_p), STEP_ROWS, labels)
    got = [tensor.grad for tensor in (*outputs, head)]
    for one, other in zip(got, at_once(name, (0.6, 0.4), temperature), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0
    log_q = (outputs[1] @ head.T / temperature).log_softmax(-1)
    alpha = torch.minimum(log_p[1:].exp(), log_q.exp()).sum().item()
    assert figures[1].alpha == pytest.approx(alpha, rel=1e-5)
    assert figures[1].rows == (int((labels[1:] >= 0).sum()) if name == "ce" else ROWS - 1)


def test_labels_that_the_draft_cannot_propose_have_no_gradient() -> None:
    outputs, head, log_p, labels = problem()
    Objective("ce", step_weights=(1.0, 1.0)).backward(outputs, head, TeacherBatch(log_p), STEP_ROWS, labels)
    assert outputs[0].grad is not None
    assert outputs[0].grad[3].abs().max() == 0
    assert outputs[0].grad[labels >= 0].abs().sum(-1).min() > 0


def test_top_k_of_everything_is_the_dense_teacher() -> None:
    outputs, head, log_p, labels = problem()
    objective = Objective("fkl", step_weights=(0.5, 0.5))
    objective.backward(outputs, head, TeacherBatch(log_p), STEP_ROWS, labels)
    dense = [output.grad.clone() for output in outputs if output.grad is not None]
    for output in outputs:
        output.grad = None
    top = log_p.topk(VOCAB - 1)
    rest = log_p.min(-1).values
    figures = objective.backward(
        outputs, head, TeacherBatch(top.values, top.indices, rest), STEP_ROWS, labels
    )
    for one, output in zip(dense, outputs, strict=True):
        torch.testing.assert_close(output.grad, one)
    assert figures[0].alpha < ROWS


def test_totals_of_all_ranks_make_summed_gradients_those_of_one_process() -> None:
    outputs, head, log_p, labels = problem()
    objective = Objective("jsd")
    halves = [slice(0, 4), slice(4, ROWS)]
    for half in halves:
        count = half.stop - half.start
        objective.backward(
            [outputs[0][half]],
            head,
            TeacherBatch(log_p[half]),
            [torch.arange(count)],
            labels[half],
            totals=[ROWS],
        )
    summed = outputs[0].grad
    whole = problem()[0][0]
    objective.backward([whole], head, TeacherBatch(log_p), [torch.arange(ROWS)], labels)
    torch.testing.assert_close(summed, whole.grad)


def test_taid_starts_at_the_draft_and_ends_at_the_teacher() -> None:
    outputs, head, log_p, labels = problem()
    objective = Objective("fkl", step_weights=(1.0, 0.0))
    norms: list[float] = []
    for share in (0.0, 0.5, 1.0):
        outputs[0].grad = None
        objective.backward(outputs, head, TeacherBatch(log_p), STEP_ROWS, labels, taid=share)
        assert outputs[0].grad is not None
        norms.append(float(outputs[0].grad.norm()))
    outputs[0].grad = None
    objective.backward(outputs, head, TeacherBatch(log_p), STEP_ROWS, labels)
    assert norms[0] < 1e-6 < norms[1] < norms[2]
    assert outputs[0].grad is not None
    assert norms[2] == pytest.approx(float(outputs[0].grad.norm()), rel=1e-5)


@pytest.mark.parametrize("name", [*losses.LOSSES, "jsd:0.1", "jsd:0", "jsd:1"])
def test_closed_forms_equal_the_eager_losses(name: str) -> None:
    _, _, log_p, _ = problem()
    log_p = log_p.clone()
    log_p[0, 0] = -torch.inf if name not in ("rkl", "jsd:1") else log_p[0, 0]
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(5)).requires_grad_()
    eager = losses.loss_named(name)(log_p, logits.log_softmax(-1))
    (expected,) = torch.autograd.grad(eager.sum(), logits)
    loss, alpha, gradient = value_and_gradient(name, log_p, logits.detach())
    torch.testing.assert_close(loss, eager.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alpha, losses.acceptance(log_p, logits.detach().log_softmax(-1)))
