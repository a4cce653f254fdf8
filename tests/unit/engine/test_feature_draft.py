"""Drafts that read the target's states through the engine: they change no output, and each block is the one that
transformers computes from the whole text and the target's states, whatever the caches hold."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from engines import NO_DRAFT, Recorder, request, spec, tiny_engine, tokens
from feature_oracle import FeatureOracle, target_states
from native_drafts import write_feature_draft, write_near_feature_draft
from policies import Timeless, with_policy

from paceline.server.decoding.verify import DraftBlock
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.engine import Engine
from paceline.server.engine.request import Request
from paceline.server.errors import ConfigError

pytestmark = pytest.mark.usefixtures("own_cache")

KNOWN = [i for i in range(300) if i % 3]
KINDS: Mapping[str, Callable[[Path, Path], Path]] = {
    "random": lambda folder, target: write_feature_draft(folder, target),
    "random, int8, restricted": lambda folder, target: write_feature_draft(
        folder, target, ids=KNOWN, int8=True
    ),
    "near": lambda folder, target: write_near_feature_draft(folder, target),
    "near, restricted": lambda folder, target: write_near_feature_draft(folder, target, ids=KNOWN),
}
PROMPTS = [[random.Random(i).randrange(4, 300) for _ in range(5 + 30 * i)] for i in range(4)]
GREEDY: dict[str, Any] = {}
PENALISED: dict[str, Any] = {"repetition_penalty": 1.2}
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "top_p": 0.9}

#: What a proposer was asked and answered: the known text, the block.
Blocks = list[tuple[list[int], tuple[int, ...]]]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """Every block that is proposed without penalties or chance, with the text before it."""
    found: Blocks = []
    propose: Callable[..., list[DraftBlock]] = DraftModelProposer.propose

    def recording(self: DraftModelProposer, items: Any, generator: Any) -> list[DraftBlock]:
        texts = [list(item.sequence.tokens) for item in items]
        result = propose(self, items, generator)
        for item, text, block in zip(items, texts, result, strict=True):
            if block.token_ids and item.sequence.takes_raw_argmax:
                found.append((text, block.token_ids))
        return result

    monkeypatch.setattr(DraftModelProposer, "propose", recording)
    return found


def with_draft(target: Path, draft: Path, recorder: Recorder | None = None, **engine: Any) -> Engine:
    return tiny_engine(spec(target, draft=draft, max_draft_tokens=4), observer=recorder, **engine)


def asked(*wishes: dict[str, Any], **extra: Any) -> list[Request]:
    return [request(prompt, ignore_eos=True, **wish, **extra) for prompt in PROMPTS for wish in wishes]


def accepted(recorder: Recorder) -> int:
    return sum(n for step in recorder.steps for n in step.accepted_per_block)


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_changes(kind: str, kernels: str, target: Path, tmp_path: Path):
    """Plain greedy (one native call), greedy with penalties and seeded (step by step), alone and beside each other."""
    draft, recorder = KINDS[kind](tmp_path / "draft", target), Recorder()
    for group in ([GREEDY], [GREEDY, PENALISED, SEEDED]):
        engine = with_draft(target, draft, recorder)
        assert tokens(engine, *asked(*group)) == tokens(engine, *asked(*group, speculation=NO_DRAFT))
    assert sum(n for step in recorder.steps for n in step.drafted_per_block) > 200
    if "near" in kind:
        assert accepted(recorder) > 20


def test_beside_ngrams_under_the_adaptive_policy_no_output_changes(
    kernels: str, target: Path, tmp_path: Path
):
    draft, recorder = write_near_feature_draft(tmp_path / "draft", target), Recorder()
    model = spec(target, draft=draft, max_draft_tokens=6, policy="adaptive", ngram=True)
    engine, long = with_policy(tiny_engine(model, observer=recorder), Timeless()), {"max_tokens": 60}
    plain = tokens(engine, *asked(GREEDY, SEEDED, speculation=NO_DRAFT, **long))
    assert tokens(engine, *asked(GREEDY, SEEDED, **long)) == plain
    assert accepted(recorder) > 20


def check_blocks(blocks: Blocks, draft: Path, target: Path) -> None:
    """Each is the reference's, which knows no caches, chunks or rollbacks."""
    oracle = FeatureOracle(draft, target)
    assert len(blocks) > 20
    for text, block in blocks:
        assert list(block) == oracle.block(text, target_states(target, text[:-1]), len(block))


@pytest.mark.parametrize("wishes", [[GREEDY], [GREEDY, PENALISED]], ids=["one call", "step by step"])
@pytest.mark.parametrize("restricted", [False, True])
def test_blocks_are_drafted_from_the_targets_states(
    restricted: bool, wishes: list[dict[str, Any]], kernels: str, target: Path, tmp_path: Path, blocks: Blocks
):
    """Also after accepted tokens, in small chunks, with a warm prefix cache and after preemption."""
    ids = KNOWN if restricted else None
    draft = write_near_feature_draft(tmp_path / "draft", target, ids=ids, state_weight=0.3)
    roomy, tight = Recorder(), Recorder()
    engine = with_draft(target, draft, roomy, max_batch_tokens=20)
    for _ in range(2):
        tokens(engine, *asked(*wishes))
    assert accepted(roomy) > 15
    assert sum(step.prefix_hits for step in roomy.steps) > 100
    block_bytes = (
        16 * (2 * 2 * 2 * 16 + 64) * 4
    )  # tokens, layers, K and V, heads, head_dim, and the state; fp32
    small = with_draft(target, draft, tight, kv_cache_gib=12 * block_bytes / 2**30)
    tokens(small, *asked(*wishes))
    assert sum(step.preemptions for step in tight.steps) > 0
    check_blocks(blocks[:: max(1, len(blocks) // 60)], draft, target)


def test_a_target_served_twice_keeps_states_only_for_the_draft_that_reads_them(
    kernels: str, target: Path, tmp_path: Path, blocks: Blocks
):
    draft = write_near_feature_draft(tmp_path / "draft", target, state_weight=0.5)
    plain = spec(target, "plain")
    engine = tiny_engine(plain, spec(target, draft=draft, max_draft_tokens=3))
    for _ in range(2):  # the second time with what the other model cached, were it taken for the same
        alone = tokens(engine, *asked(GREEDY, model="plain"))
        assert tokens(engine, *asked(GREEDY)) == alone
    check_blocks(blocks[::4], draft, target)


def test_what_cannot_be_served_is_refused(
    kernels: str, tiny_checkpoint: TinyCheckpoint, target: Path, tmp_path: Path
):
    own = write_feature_draft(tmp_path / "draft", target, shared=())
    with pytest.raises(
        ConfigError, match=r"reads the states of a target, so that it can only draft: .*--draft"
    ):
        tiny_engine(spec(own))
    wide = tiny_checkpoint("llama", hidden_size=72)
    with pytest.raises(ConfigError, match=r"reads states of width 64, but those of .* have 72") as caught:
        with_draft(wide, own)
    assert "\n" not in str(caught.value)
