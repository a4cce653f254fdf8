"""Drafts in native form through the engine: they change no output, and propose only ids that they know."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from engines import NO_DRAFT, Recorder, request, run, spec, submit, tiny_engine, tokens
from native_drafts import EMBEDDING, HEAD, write_draft
from native_kernels import require_native
from statistics_helpers import Floats, joint_chi_square, joint_counts
from transformers import AutoModelForCausalLM

from paceline.kernels.cpu.verification import SampledBlock, verify_sampled
from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine import cpu_runner
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.engine import Engine
from paceline.server.errors import ArtifactError, ConfigError

pytestmark = pytest.mark.usefixtures("own_cache")

#: Two thirds of the vocabulary: the target often wants what the draft cannot propose.
KNOWN = [i for i in range(300) if i % 3]
KINDS: Mapping[str, dict[str, Any]] = {
    "restricted": {"ids": KNOWN},
    "restricted, shared": {"ids": KNOWN, "shared": [EMBEDDING, HEAD]},
    "restricted, int8": {"ids": KNOWN, "int8": True},
    "int8": {"int8": True},
}
PROMPTS = [[random.Random(i).randrange(4, 300) for _ in range(5 + 9 * i)] for i in range(4)]


@pytest.fixture
def near(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", perturb=0.02)


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every id that a draft model proposes."""
    ids: list[int] = []
    propose: Callable[..., list[DraftBlock]] = DraftModelProposer.propose

    def recording(self: DraftModelProposer, *arguments: Any) -> list[DraftBlock]:
        blocks = propose(self, *arguments)
        ids.extend(token for block in blocks for token in block.token_ids)
        return blocks

    monkeypatch.setattr(DraftModelProposer, "propose", recording)
    return ids


def with_draft(target: Path, draft: Path, recorder: Recorder | None = None, **engine: Any) -> Engine:
    model = spec(target, draft=draft, max_draft_tokens=4)
    return tiny_engine(model, observer=recorder or Recorder(), **engine)


@pytest.mark.parametrize("kind", KINDS)
def test_no_draft_changes_greedy_or_seeded_output(
    kind: str, kernels: str, target: Path, near: Path, tmp_path: Path, proposed: list[int]
):
    """Plain greedy (one native call), greedy with penalties and seeded, alone and beside each other."""
    draft = write_draft(tmp_path / "draft", target, near, **KINDS[kind])
    wishes: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.2},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    ]
    recorder = Recorder()
    for group in ([wishes[0]], wishes):
        asked = [(prompt, wish) for prompt in PROMPTS for wish in group]
        plain = [request(prompt, speculation=NO_DRAFT, ignore_eos=True, **wish) for prompt, wish in asked]
        drafted = [request(prompt, ignore_eos=True, **wish) for prompt, wish in asked]
        engine = with_draft(target, draft, recorder)
        assert tokens(engine, *drafted) == tokens(engine, *plain)
    assert sum(n for step in recorder.steps for n in step.accepted_per_block) > 20
    assert len(proposed) > 50
    assert set(proposed) <= set(KINDS[kind].get("ids", range(300)))


def test_sampled_requests_propose_only_known_ids(
    kernels: str, target: Path, near: Path, tmp_path: Path, proposed: list[int]
):
    draft = write_draft(tmp_path / "draft", target, near, ids=KNOWN)
    warped: dict[str, Any] = {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "logit_bias": {0: 100.0, 3: 100.0}}
    asked = [
        request(prompt, temperature=1.5, ignore_eos=True, **wish)
        for prompt in PROMPTS
        for wish in ({}, warped)
    ]
    run(with_draft(target, draft), *asked)
    assert len(proposed) > 50
    assert set(proposed) <= set(KNOWN)


def test_a_draft_all_of_whose_ids_are_masked_proposes_nothing(
    kernels: str, target: Path, near: Path, tmp_path: Path, proposed: list[int]
):
    few = [10, 20, 30]
    draft = write_draft(tmp_path / "draft", target, near, ids=few)
    wish: dict[str, Any] = {
        "temperature": 1.0,
        "stop_token_ids": tuple(few),
        "min_tokens": 16,
        "max_tokens": 16,
    }
    ((events,),) = run(with_draft(target, draft), request(PROMPTS[0], **wish))
    assert sum(len(event.token_ids) for event in events) == 16
    assert proposed == []
    run(with_draft(target, draft), request(PROMPTS[0], temperature=1.0, ignore_eos=True))
    assert set(proposed) <= set(few)
    assert proposed


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_requests_are_verified_by_the_native_rule(
    rule: str, target: Path, near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the draft's q, and by the rule that was asked for; greedy and seeded requests have no use for it."""
    require_native()
    calls: list[tuple[bool, list[SampledBlock]]] = []

    def recording(
        scores: Any, blocks: list[SampledBlock], uniforms: Any, *, by_block: bool, pool: Any
    ) -> Any:
        calls.append((by_block, blocks))
        return verify_sampled(scores, blocks, uniforms, by_block=by_block, pool=pool)

    monkeypatch.setattr(cpu_runner, "verify_sampled", recording)
    draft = write_draft(tmp_path / "draft", target, near, ids=KNOWN)
    engine = tiny_engine(spec(target, draft=draft, max_draft_tokens=3, verify=rule))
    run(engine, request(PROMPTS[0], temperature=0.0), request(PROMPTS[1], temperature=1.0, seed=1))
    assert not calls
    run(engine, request(PROMPTS[0], temperature=1.0, ignore_eos=True))
    assert {by_block for by_block, _ in calls} == {rule == "block"}
    drafted = [block for _, blocks in calls for block in blocks if block.token_ids]
    assert len(drafted) > 3
    assert all(block.q is not None and block.q.shape[1] == len(KNOWN) for block in drafted)


def exact_joint(target: Path, prompt: Sequence[int], vocab: int) -> Floats:
    """p(second and third output token), summed over the first, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")

    def following(outputs: torch.Tensor) -> torch.Tensor:
        context = torch.tensor([prompt]).expand(len(outputs), -1)
        with torch.no_grad():
            logits = model(torch.cat((context, outputs), dim=1)).logits[:, -1]
        p: torch.Tensor = logits.double().softmax(-1)
        return p

    ids = torch.arange(vocab)
    first = following(torch.zeros(1, 0, dtype=torch.long))[0]
    second = following(ids[:, None])
    third = following(torch.cartesian_prod(ids, ids)).view(vocab, vocab, vocab)
    joint = torch.einsum("i,ij,ijk->jk", first, second, third)
    return np.asarray(joint.numpy())


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_output_follows_the_targets_distribution(
    rule: str, kernels: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, proposed: list[int]
):
    vocab, ids, prompt, samples = 16, [1, 2, 5, 6, 9, 13], (4, 9, 6), 6_400
    target = tiny_checkpoint("llama", vocab_size=vocab)
    near = tiny_checkpoint("llama", vocab_size=vocab, perturb=0.3)
    draft = write_draft(tmp_path / "draft", target, near, ids=ids)
    recorder = Recorder()
    model = spec(target, draft=draft, max_draft_tokens=3, verify=rule)
    engine = tiny_engine(model, observer=recorder, kv_cache_gib=1 / 16, max_running=128)
    asked = [
        request(prompt, n=128, max_tokens=5, temperature=1.0, ignore_eos=True) for _ in range(samples // 128)
    ]
    outputs: dict[tuple[str, int], list[int]] = {}
    submit(engine, *asked)
    while engine.has_work:
        for request_id, event in engine.step():
            outputs.setdefault((request_id, event.choice), []).extend(event.token_ids)
    drawn = np.array([found[1:3] for found in outputs.values()])
    assert len(drawn) == samples
    p = joint_chi_square(joint_counts(drawn, vocab), exact_joint(target, prompt, vocab))
    assert p > 1e-4
    assert set(proposed) == set(ids)
    accepted = [n for step in recorder.steps for n in step.accepted_per_block]
    drafted = [n for step in recorder.steps for n in step.drafted_per_block]
    assert 0.05 * sum(drafted) < sum(accepted) < 0.9 * sum(drafted)


def test_what_does_not_fit_the_target_is_refused(
    kernels: str, tiny_checkpoint: TinyCheckpoint, target: Path, near: Path, tmp_path: Path
):
    draft = write_draft(tmp_path / "draft", target, near, ids=KNOWN, shared=[EMBEDDING])
    with pytest.raises(ArtifactError, match="SHA-256") as caught:
        with_draft(tiny_checkpoint("llama", seed=3), draft)
    assert "\n" not in str(caught.value)
    own = write_draft(tmp_path / "own", target, near, ids=KNOWN)
    with pytest.raises(ConfigError, match=r"knows 200 of 300 ids, so that it can only draft: .*--draft"):
        tiny_engine(spec(own))


def test_a_draft_of_another_tokenizer_is_refused_with_both_hashes(
    kernels: str, tiny_checkpoint: TinyCheckpoint, target: Path, near: Path, tmp_path: Path
):
    """By what the manifest says, although the folder's tokenizer is the target's."""
    from native_drafts import base_of

    other = base_of(tiny_checkpoint("llama", vocab_size=310))
    draft = write_draft(tmp_path / "draft", target, near, ids=KNOWN, base=other)
    with pytest.raises(ArtifactError, match="tokenizer") as caught:
        with_draft(target, draft)
    assert other.tokenizer_sha256 in str(caught.value)
    assert base_of(target).tokenizer_sha256 in str(caught.value)
