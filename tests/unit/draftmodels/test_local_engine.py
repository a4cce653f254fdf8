"""The engine in process: its text is that of single requests, its counts are those of a computation by hand."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from engines import NO_DRAFT, request, spec, tiny_engine, tokens
from native_drafts import EMBEDDING, HEAD, write_draft, write_feature_draft
from tiny import EOS_ID
from transformers import AutoModelForCausalLM

from paceline.draftmodels.acceptance import Acceptance, BlockCounter
from paceline.draftmodels.data.seeds import derive_seed
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.engine.interface import StepStats
from paceline.server.errors import ArtifactError, ConfigError, DataError
from paceline.server.models.loader import ModelLoader

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = [[random.Random(i).randrange(4, 300) for _ in range(3 + 7 * i)] for i in range(7)]
KNOWN = [3, *(i for i in range(4, 300) if i % 3)]
Local = Callable[..., LocalEngine]


@pytest.fixture
def near(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", perturb=0.1)


def answers(sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    return [sequence.answer for sequence in sequences]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_is_that_of_single_requests(
    temperature: float, kernels: str, local: Local, target: Path
) -> None:
    engine = local()
    together = engine.generate(PROMPTS, temperature=temperature, max_tokens=20, seed=11)
    assert [s.tokens[: s.prompt_tokens] for s in together] == [tuple(p) for p in PROMPTS]
    served = tiny_engine(spec(target))
    for i, sequence in enumerate(together):
        wish: dict[str, Any] = {"temperature": temperature, "max_tokens": 20, "seed": derive_seed(11, i)}
        (alone,) = tokens(served, request(PROMPTS[i], **wish, speculation=NO_DRAFT))
        assert sequence.answer == tuple(alone)
    assert engine.generate(PROMPTS[:2], temperature=temperature, max_tokens=20, seed=11) == together[:2]
    assert local(streams=1).generate(PROMPTS, temperature=temperature, max_tokens=20, seed=11) == together


def test_seeds_make_the_text(kernels: str, local: Local) -> None:
    engine = local()
    same = [PROMPTS[1]] * 4
    texts = answers(engine.generate(same, temperature=1.0, max_tokens=12, seed=0))
    assert len(set(texts)) == 4
    assert texts == answers(engine.generate(same, temperature=1.0, max_tokens=12, seed=0))
    assert texts != answers(engine.generate(same, temperature=1.0, max_tokens=12, seed=1))


def test_text_does_not_depend_on_the_draft_at_hand(kernels: str, local: Local, near: Path) -> None:
    engine = local()
    before = engine.generate(PROMPTS, temperature=1.0, max_tokens=12, seed=0)
    engine.use_draft(near)
    assert engine.generate(PROMPTS, temperature=1.0, max_tokens=12, seed=0) == before


def test_answers_end_at_stop_ids_and_where_the_context_ends(local: Local) -> None:
    engine = local(context_length=40)
    (free,) = engine.generate([PROMPTS[2]], temperature=0.0, max_tokens=100, seed=0)
    assert len(free.tokens) == engine.context_length == 40
    stop = free.answer[5]
    (stopped,) = engine.generate([PROMPTS[2]], temperature=0.0, max_tokens=100, seed=0, stop_token_ids=[stop])
    assert stopped.answer == free.answer[: free.answer.index(stop) + 1]


@pytest.mark.parametrize("length", [0, 40, 50])
def test_prompts_that_leave_no_room_are_refused(length: int, local: Local) -> None:
    engine = local(context_length=40)
    with pytest.raises(DataError, match=rf"prompt 1 has {length} tokens.*context of 40"):
        engine.generate([PROMPTS[0], [5] * length], temperature=0.0, max_tokens=4, seed=0)


def test_a_target_as_its_own_draft_is_always_right(kernels: str, local: Local, target: Path) -> None:
    engine = local(draft=target)
    counts = engine.measure(PROMPTS, temperature=0.0, max_tokens=13, draft_tokens=3)
    # One token with the prompt, then three full blocks of 3 draft tokens and 1 of the target's.
    assert counts.alpha_per_position == (1.0, 1.0, 1.0)
    assert (counts.alpha, counts.tau) == (1.0, 4.0)
    assert counts.histogram == (0, 0, 0, 3 * len(PROMPTS))
    assert (counts.n_tokens, counts.drafted, counts.accepted) == (13 * 7, 9 * 7, 9 * 7)
    assert (counts.forwards, counts.committed) == (3 * 7, 12 * 7)


def by_hand(target: Sequence[int], draft: Callable[[list[int]], int], start: int, draft_tokens: int) -> Any:
    """(examined, accepted) per position and (forwards, committed) of greedy speculation over a known greedy text."""
    examined, accepted, text = [0] * draft_tokens, [0] * draft_tokens, list(target[: start + 1])
    forwards = committed = 0
    while len(text) < len(target):
        block: list[int] = []
        for _ in range(min(draft_tokens, len(target) - len(text) - 1)):
            block.append(draft(text + block))
        kept = 0
        for position, token in enumerate(block):
            examined[position] += 1
            if token != target[len(text) + kept]:
                break
            accepted[position] += 1
            kept += 1
        text = list(target[: len(text) + kept + 1])
        forwards, committed = forwards + 1, committed + kept + 1
    return examined, accepted, forwards, committed


def test_greedy_counts_are_those_of_a_computation_by_hand(
    kernels: str, local: Local, near: Path, target: Path
) -> None:
    engine, alone = local(draft=near), local(near)
    greedy = engine.generate(PROMPTS, temperature=0.0, max_tokens=17, seed=0)

    def draft(text: list[int]) -> int:
        return alone.generate([text], temperature=0.0, max_tokens=1, seed=0)[0].answer[0]

    hands = [by_hand(s.tokens, draft, s.prompt_tokens, 3) for s in greedy]
    counts = engine.measure(PROMPTS, temperature=0.0, max_tokens=17, draft_tokens=3)
    assert list(counts.examined) == [sum(column) for column in zip(*(h[0] for h in hands), strict=True)]
    assert list(counts.accepted_at) == [sum(column) for column in zip(*(h[1] for h in hands), strict=True)]
    assert (counts.forwards, counts.committed) == (sum(h[2] for h in hands), sum(h[3] for h in hands))
    assert 0 < counts.alpha < 1
    assert counts.tau == counts.committed / counts.forwards
    assert counts.n_tokens == sum(s.answer_tokens for s in greedy)


def test_alpha_at_temperature_1_is_the_overlap_of_the_distributions(
    local: Local, target: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """The first draft token comes after one token x of the target's: alpha is E_x[sum_v min(p, q)], by transformers."""
    near, prompt, samples = tiny_checkpoint("llama", perturb=0.3), PROMPTS[1], 600
    first = following(target, [prompt])[0]
    first[EOS_ID] = 0  # nothing is drafted after it
    first /= first.sum()
    texts = [[*prompt, x] for x in range(len(first))]
    overlap = torch.minimum(following(target, texts), following(near, texts)).sum(-1)
    expected = float((first * overlap).sum())
    assert 0.2 < expected < 0.9

    def measured(seed: int) -> Acceptance:
        return engine.measure([prompt] * samples, temperature=1.0, max_tokens=3, draft_tokens=1, seed=seed)

    engine = local(draft=near, streams=100)
    counts = measured(4)
    assert samples - 30 < counts.examined[0] <= samples
    assert abs(counts.alpha - expected) < 0.08  # four standard deviations
    assert counts == measured(4)
    assert counts != measured(5)


def following(model: Path, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Next-token distributions, float64 [texts, vocab]."""
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = decoder(torch.tensor(texts)).logits[:, -1].double()
    return logits.softmax(-1)


def test_blocks_cut_short_are_examined_no_further_than_they_go() -> None:
    blocks = BlockCounter(3)
    phases = dict.fromkeys(("schedule", "draft", "forward", "sample", "commit"), 0.0)
    blocks.on_step(
        StepStats("m", phases, 0, 0, drafted_per_block=[3, 3, 1, 2], accepted_per_block=[0, 3, 1, 1])
    )
    counts = blocks.acceptance([[(1,), (2,), (3, 4, 5, 6)], [(7,), (8, 9)], [(1,), (2, 3), (4,)]])
    assert counts.examined == (4, 2, 1)
    assert counts.accepted_at == (3, 1, 1)
    assert counts.histogram == (1, 2, 0, 1)
    assert (counts.drafted, counts.accepted, counts.n_tokens) == (9, 5, 13)
    assert (counts.forwards, counts.committed) == (5, 10)  # the last forward had no block
    assert counts.alpha == 5 / 7
    nothing = BlockCounter(1).acceptance([[(1,)]])
    assert nothing.tau != nothing.tau  # no forward to speak of


def test_swapping_the_draft_keeps_the_target_and_reads_the_folder_anew(
    kernels: str, local: Local, target: Path, near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = local()
    loaded: list[Path] = []
    load = ModelLoader.load

    def counting(self: ModelLoader, path: Path, *args: Any, **options: Any) -> Any:
        loaded.append(path)
        return load(self, path, *args, **options)

    monkeypatch.setattr(ModelLoader, "load", counting)
    monkeypatch.delattr(
        "paceline.server.engine.parts.load_tokenizer"
    )  # a copy of the target's is known already
    weights = engine.target.weights
    folder = tmp_path / "current"
    taus = []
    for source in (near, target, near):
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        write_draft(
            folder, target, source, ids=KNOWN, shared=[EMBEDDING] if source is target else [], int8=True
        )
        engine.use_draft(folder)
        taus.append(engine.measure(PROMPTS, temperature=0.0, max_tokens=25, draft_tokens=3).tau)
    assert loaded == [folder] * 3
    assert engine.target.weights is weights
    assert taus[0] == taus[2] < taus[1]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing of a draft in training is kept
    engine.use_draft(None)
    with pytest.raises(ConfigError, match="no draft"):
        engine.measure(PROMPTS, temperature=0.0, max_tokens=4, draft_tokens=3)


def test_a_draft_that_cannot_be_used_leaves_the_old_one(local: Local, near: Path, tmp_path: Path) -> None:
    engine = local(draft=near)
    before = engine.measure(PROMPTS, temperature=0.0, max_tokens=9, draft_tokens=2)
    (tmp_path / "broken").mkdir()
    with pytest.raises(ArtifactError):
        engine.use_draft(tmp_path / "broken")
    assert engine.measure(PROMPTS, temperature=0.0, max_tokens=9, draft_tokens=2) == before
    with pytest.raises(ConfigError, match="1 to 32"):
        engine.measure(PROMPTS, temperature=0.0, max_tokens=9, draft_tokens=33)


def test_an_independent_drafts_text_is_its_own(
    kernels: str, local: Local, target: Path, near: Path, tmp_path: Path
) -> None:
    draft = write_draft(tmp_path / "draft", target, near, ids=KNOWN, shared=[EMBEDDING])
    engine = local(draft=draft)
    texts = engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=20, seed=3)
    assert {token for s in texts for token in s.answer} <= set(KNOWN)
    assert texts == engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=20, seed=3)
    whole = local(draft=write_draft(tmp_path / "whole", target, near))
    served = local(near).generate(PROMPTS, temperature=1.0, max_tokens=20, seed=3)
    assert whole.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=20, seed=3) == served


def test_lenient_text_is_the_drafts_but_for_one_token_a_block(
    kernels: str, local: Local, near: Path, target: Path
) -> None:
    engine, alone = local(draft=near), local(near)
    texts = engine.generate_from_draft(PROMPTS, temperature=0.0, max_tokens=15, seed=3, lenient_block=6)
    exact = engine.generate(PROMPTS, temperature=0.0, max_tokens=15, seed=3)
    for sequence, plain in zip(texts, exact, strict=True):
        assert sequence.answer[0] == plain.answer[0]
        prefix, position = sequence.prompt_tokens + 1, 0
        while position < 14:
            block = sequence.tokens[prefix + position :][:6]
            own = alone.generate(
                [sequence.tokens[: prefix + position]], temperature=0.0, max_tokens=6, seed=0
            )
            assert block == own[0].answer[: len(block)]
            position += 7
    sampled = [
        engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=15, seed=seed, lenient_block=6)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_draft_that_reads_states_writes_leniently(
    kernels: str, local: Local, target: Path, tmp_path: Path
) -> None:
    draft = write_feature_draft(tmp_path / "draft", target)
    engine = local(draft=draft)
    texts = engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=19, seed=3)
    assert texts == engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=19, seed=3)
    assert answers(texts) != answers(engine.generate(PROMPTS, temperature=1.0, max_tokens=19, seed=3))
    counts = engine.measure(PROMPTS, temperature=1.0, max_tokens=19, draft_tokens=2)
    assert counts.drafted > 0
    assert counts.alpha < 0.9


def test_kernels_and_torch_take_turns(local: Local, near: Path) -> None:
    torch.set_num_threads(2)
    try:
        engine = local(draft=near)
        assert torch.get_num_threads() == 2
        seen: set[int] = set()
        engine.generate(
            PROMPTS,
            temperature=1.0,
            max_tokens=4,
            seed=0,
            progress=lambda *_: seen.add(torch.get_num_threads()),
        )
        assert torch.get_num_threads() == 2
        assert seen == {1 if engine.pool is not None else 2}
    finally:
        torch.set_num_threads(1)


def test_progress_counts_requests(local: Local) -> None:
    told: list[tuple[int, int]] = []
    local().generate(PROMPTS, temperature=0.0, max_tokens=3, seed=0, progress=lambda *both: told.append(both))
    assert told == [(i + 1, 7) for i in range(7)]


def test_an_interrupted_call_leaves_no_trace(local: Local) -> None:
    engine = local()
    before = engine.generate(PROMPTS, temperature=1.0, max_tokens=9, seed=0)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, temperature=1.0, max_tokens=9, seed=0, progress=stop)
    assert engine.generate(PROMPTS, temperature=1.0, max_tokens=9, seed=0) == before


def test_shared_head_and_embedding_come_from_the_target(local: Local, target: Path, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", target, target, shared=[EMBEDDING, HEAD])
    engine = local(draft=draft)
    own = engine.generate_from_draft(PROMPTS, temperature=1.0, max_tokens=9, seed=0)
    assert own == engine.generate(PROMPTS, temperature=1.0, max_tokens=9, seed=0)
