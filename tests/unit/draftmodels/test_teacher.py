"""The teacher's rows against transformers: states, log-probabilities over proposable ids, top-k with the exact rest."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.draftmodels import teacher as module
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.teacher import Teacher, TeacherRows
from paceline.server.errors import ConfigError, DataError

IDS = torch.tensor([i for i in range(300) if i % 3], dtype=torch.int32)
_RANDOM = random.Random(0)


def sequence(length: int, prompt: int) -> TokenSequence:
    return TokenSequence(tuple(_RANDOM.randrange(4, 300) for _ in range(length)), prompt)


#: Among them a prompt of one token, no answer at all, one token alone, and one longer than a forward.
SEQUENCES = [
    sequence(20, 7),
    sequence(9, 1),
    sequence(12, 12),
    sequence(1, 1),
    sequence(140, 33),
    sequence(31, 30),
]


@pytest.fixture(autouse=True)
def small_forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forwards and chunks that cut sequences everywhere."""
    monkeypatch.setattr(module, "ROWS", 48)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 5)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


def oracle(target: Path, one: TokenSequence, temperature: float) -> tuple[Tensor, Tensor]:
    """States after the final norm [tokens, hidden] and log-probabilities [answer tokens, vocab], float64."""
    decoder = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        states = decoder.model(torch.tensor([one.tokens])).last_hidden_state[0]
        logits = decoder.lm_head(states[one.prompt_tokens - 1 : len(one.tokens) - 1])
    return states, (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_are_those_of_transformers(
    temperature: float, kernels: str, local: Callable[..., LocalEngine], target: Path
) -> None:
    """fp32 against float64: the same tolerance as the executor's own oracle test."""
    rows = Teacher(local(), IDS, dtype=torch.float32).rows(SEQUENCES, temperature)
    for one, found in zip(SEQUENCES, rows, strict=True):
        states, log_p = oracle(target, one, temperature)
        assert found.states.dtype is torch.float32
        torch.testing.assert_close(found.states.double(), states, rtol=1e-3, atol=1e-3)
        assert found.log_p.shape == (one.answer_tokens, len(IDS))
        torch.testing.assert_close(found.log_p.double(), log_p[:, IDS.long()], rtol=1e-3, atol=2e-3)
        assert (found.ids, found.log_rest) == (None, None)


def test_all_ids_without_a_restriction(kernels: str, local: Callable[..., LocalEngine], target: Path) -> None:
    (rows,) = Teacher(local(), None, dtype=torch.float32).rows(SEQUENCES[:1])
    torch.testing.assert_close(rows.log_p.exp().sum(-1), torch.ones(13))
    _, log_p = oracle(target, SEQUENCES[0], 1.0)
    torch.testing.assert_close(rows.log_p.double(), log_p, rtol=1e-3, atol=2e-3)


def test_top_k_and_the_rest_are_the_restricted_mass(kernels: str, local: Callable[..., LocalEngine]) -> None:
    engine = local()
    dense = Teacher(engine, IDS, dtype=torch.float32).rows(SEQUENCES)
    for found, full in zip(
        Teacher(engine, IDS, top_k=10, dtype=torch.float32).rows(SEQUENCES), dense, strict=True
    ):
        assert found.ids is not None
        assert found.log_rest is not None
        assert found.ids.dtype is torch.int32
        assert found.log_p.shape == found.ids.shape == (len(full.log_p), 10)
        mass = torch.cat((found.log_p, found.log_rest[:, None]), dim=1).exp().sum(-1)
        torch.testing.assert_close(mass, full.log_p.exp().sum(-1))
        torch.testing.assert_close(found.log_p, full.log_p.topk(10).values, rtol=0, atol=0)
        torch.testing.assert_close(full.log_p.gather(1, found.ids.long()), found.log_p, rtol=0, atol=0)


def bits(rows: Sequence[TeacherRows]) -> list[Tensor]:
    return [
        part for row in rows for part in (row.states, row.log_p, row.ids, row.log_rest) if part is not None
    ]


def test_the_same_sequences_give_the_same_bits(kernels: str, local: Callable[..., LocalEngine]) -> None:
    engine = local()
    teacher = Teacher(engine, IDS, top_k=20)
    once = bits(teacher.rows(SEQUENCES))
    teacher.rows([sequence(200, 3)])  # more room, other content
    again = bits(teacher.rows(SEQUENCES))
    fresh = bits(Teacher(local(), IDS, top_k=20).rows(SEQUENCES))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, fresh, strict=True))


def test_states_are_in_the_type_of_the_cache(kernels: str, local: Callable[..., LocalEngine]) -> None:
    """What a feature-reading draft will see when served; the default log_p costs half the memory."""
    (rows,) = Teacher(local(weights="bf16"), IDS).rows(SEQUENCES[:1])
    assert rows.states.dtype is torch.bfloat16
    assert rows.log_p.dtype is torch.float16
    assert not rows.log_p.is_inference()  # or losses could not take part in autograd
    assert not rows.states.is_inference()


def test_an_interrupted_run_leaves_no_trace(local: Callable[..., LocalEngine]) -> None:
    teacher = Teacher(local(), IDS)
    once = bits(teacher.rows(SEQUENCES))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for length in (70, 80, 90):  # of which 48 have run then
        with pytest.raises(KeyboardInterrupt):
            teacher.rows([sequence(length, 1)], progress=stop)
    assert all(map(torch.equal, once, bits(teacher.rows(SEQUENCES))))


def test_what_cannot_be_taught_is_refused(local: Callable[..., LocalEngine]) -> None:
    engine = local()
    with pytest.raises(DataError, match=r"513 tokens .* context of 512"):
        Teacher(engine, IDS).rows([sequence(513, 3)])
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        Teacher(engine, IDS).rows(SEQUENCES, 0.0)
    for top_k in (0, 201):
        with pytest.raises(ConfigError, match="between 1 and the draft's 200 ids"):
            Teacher(engine, IDS, top_k=top_k)
    assert Teacher(engine, IDS).rows([]) == []
