"""Loss and gradients against transformers: on answers only, whatever the forwards; measured as stored; matches."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.expert_finetune.answers import is_match
from paceline.draftmodels.expert_finetune.recipe import load_recipe
from paceline.draftmodels.expert_finetune.supervised import Examination, Supervised
from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.finetune.decoder import make_trained
from paceline.draftmodels.finetune.method import FinetuneState
from paceline.server.engine.interface import Tokenizer
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config

CPU = torch.device("cpu")


def sequences(seed: int = 0) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 20, (5,), generator=generator).tolist()
    return [
        TokenSequence(tuple(torch.randint(300, (n,), generator=generator).tolist()), 2 + i)
        for i, n in enumerate(lengths)
    ]


def method(target: Path, *, stored: torch.dtype = torch.float32, train_embedding: bool = True) -> Supervised:
    checkpoint = open_checkpoint(target)
    config = parse_model_config(checkpoint.hf_config)
    model = make_trained(checkpoint, config, CPU, train_embedding=train_embedding, checkpointing=False)
    held_out = make_batch(sequences(9), CPU, answers_only=True)
    return Supervised(model, Examination([held_out], stored), dtype=torch.float32)


def reference_loss(model: torch.nn.Module, own: list[TokenSequence], *, answers_only: bool) -> torch.Tensor:
    """Mean over learnt tokens, one sequence at a time, prompts masked the way that transformers users do it."""
    total, count = torch.zeros(()), 0
    for sequence in own:
        labels = torch.tensor([sequence.tokens])
        if answers_only:
            labels[:, : sequence.prompt_tokens] = -100
        learnt = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=torch.tensor([sequence.tokens]), labels=labels).loss * learnt
        count += learnt
    return total / count


def oracle(target: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    )
    return model


@pytest.mark.parametrize("answers_only", [True, False])
@pytest.mark.parametrize("rows", [1000, 25])
def test_loss_and_gradients_are_those_of_transformers(target: Path, rows: int, *, answers_only: bool) -> None:
    own, supervised, theirs = sequences(), method(target), oracle(target)
    batches = [make_batch(group, CPU, answers_only=answers_only) for group in grouped(own, rows)]
    assert (len(batches) > 1) is (rows == 25)
    losses = supervised.backward(batches, FinetuneState(), lambda: 1.0)
    expected = reference_loss(theirs, own, answers_only=answers_only)
    expected.backward()
    assert losses.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert losses.rows == sum(len(s.tokens) for s in own)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert supervised.parameters.keys() == gradients.keys()
    for name, parameter in supervised.parameters.items():
        assert parameter.grad is not None
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-3, f"{name}: {error}"


def test_tokens_of_prompts_are_context_and_no_labels(target: Path) -> None:
    """The last row of the head that an id reaches only as a prompt's token has the gradient of any wrong id: > 0."""
    supervised = method(target)
    (sequence,) = [TokenSequence((7, 8, 9, 10, 11), 3)]
    supervised.backward([make_batch([sequence], CPU, answers_only=True)], FinetuneState(), lambda: 1.0)
    head = supervised.model.head.grad
    assert head is not None
    with torch.no_grad():
        states = supervised.model(make_batch([sequence], CPU, answers_only=True))[-1]
    # d loss / d head[v] = sum over learnt rows of (p_v - [v is the label]) state / learnt rows
    probabilities = (states[[2, 3]] @ supervised.model.head.T).softmax(-1)
    expected = probabilities.T @ states[[2, 3]] / 2
    expected[10] -= states[2] / 2
    expected[11] -= states[3] / 2
    assert torch.allclose(head, expected, atol=1e-6)


def test_held_out_loss_is_that_of_the_stored_weights(target: Path) -> None:
    found = {stored: method(target, stored=stored).measure() for stored in (torch.float32, torch.bfloat16)}
    for stored, figures in found.items():
        theirs = oracle(target)
        theirs.load_state_dict({name: t.to(stored).float() for name, t in theirs.state_dict().items()})
        with torch.no_grad():
            expected = float(reference_loss(theirs, sequences(9), answers_only=True))
        assert figures["loss"] == pytest.approx(expected, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
        assert figures["n_tokens"] == sum(s.answer_tokens for s in sequences(9))
    assert found[torch.float32]["loss"] != found[torch.bfloat16]["loss"]


def test_measuring_changes_nothing(target: Path) -> None:
    supervised = method(target, stored=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in supervised.parameters.items()}
    supervised.measure()
    assert all(torch.equal(p, before[name]) for name, p in supervised.parameters.items())


def test_embedding_and_head_can_stay_as_they_are(target: Path) -> None:
    every, most = method(target), method(target, train_embedding=False)
    assert set(every.parameters) - set(most.parameters) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_epochs_are_a_limit_beside_the_others() -> None:
    assert load_recipe(None, {"data": "x"}).budget(1000).tokens == 3000
    assert load_recipe(None, {"data": "x", "epochs": "0.5"}).budget(1000).tokens == 500
    both = load_recipe(None, {"data": "x", "epochs": "2", "max_tokens": "10k", "max_time": "5m"}).budget(1000)
    assert (both.tokens, both.seconds, both.steps) == (2000, 300.0, None)
    only_steps = load_recipe(None, {"data": "x", "max_steps": "7"}).budget(1000)
    assert (only_steps.tokens, only_steps.steps) == (None, 7)


class _Tokenizer:
    """Bytes as ids; 0 ends a sequence."""

    eos_ids = frozenset({0})

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i).decode()


@pytest.mark.parametrize(
    ("written", "matches"),
    [(b"yes\0", True), (b" yes \0", True), (b"yes", False), (b"yes!\0", False), (b"\0", False)],
)
def test_a_match_is_the_right_text_ended_by_the_model(written: bytes, *, matches: bool) -> None:
    right = TokenSequence(tuple(b"Q: yes\0"), 2)
    answer = TokenSequence(tuple(b"Q:" + written), 2)
    assert is_match(answer, right, cast(Tokenizer, _Tokenizer())) is matches
