"""Sparse students in the engine: targets say what the same weights say when dense, and drafts change nothing."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from engines import NO_DRAFT, Recorder, request, run, spec, tiny_engine, tokens
from native_drafts import EMBEDDING, HEAD, write_draft, write_near_feature_draft
from native_kernels import require_native
from sparse_students import write_dense_twin, write_tiny_student

from paceline.kernels.cpu.library import ISAS
from paceline.server.engine import parts
from paceline.server.engine.engine import Engine
from paceline.server.engine.request import Request
from paceline.server.errors import ArtifactError
from paceline.server.models.manifest import read_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = [[random.Random(i).randrange(4, 300) for _ in range(5 + 9 * i)] for i in range(4)]
WISHES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9},
]


def asked(**common: Any) -> list[Request]:
    return [request(p, ignore_eos=True, **wish, **common) for p in PROMPTS for wish in WISHES]


def engine(target: Path, weights: Any = "fp32", **settings: Any) -> Engine:
    return tiny_engine(spec(target, weights=weights), **settings)


@pytest.mark.parametrize("pattern", ["unstructured", "16:32"])
def test_a_student_says_what_its_weights_say_stored_dense(
    pattern: str, kernels: str, target: Path, tmp_path: Path
):
    student = write_tiny_student(tmp_path / "s", target, pattern=pattern)
    twin = write_dense_twin(tmp_path / "d", target, pattern=pattern)
    got = tokens(engine(student), *asked())
    assert got == tokens(engine(twin), *asked())
    assert got != tokens(engine(target), *asked()), "pruning half of it changes what a model says"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_in_int8_not_a_bit_differs_from_dense(
    dtype: Any, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    require_native()
    monkeypatch.setenv("PACELINE_KERNELS", "native")
    outputs = []
    for write, name in ((write_tiny_student, "s"), (write_dense_twin, "d")):
        folder = write(tmp_path / name, target, dtype=dtype)
        events = run(engine(folder, "int8"), *asked(logprobs=3))
        outputs.append([[(e.token_ids, e.logprobs) for e in choices[0]] for choices in events])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("isa", ISAS)
def test_the_crowd_changes_nothing(isa: Any, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Alone, all at once, in chunks, and speculating against itself."""
    require_native(isa)
    monkeypatch.setenv("PACELINE_KERNELS", "native")
    monkeypatch.setenv("PACELINE_ISA", isa)
    student = write_tiny_student(tmp_path / "s", target, dtype="int8", sparsity=0.7)

    def outputs(engine: Engine, requests: list[Request]) -> list[Any]:
        events = [choices[0] for choices in run(engine, *requests)]
        return [
            [entry for e in own for entry in zip(e.token_ids, e.logprobs or (), strict=True)]
            for own in events
        ]

    alone = [outputs(engine(student, "int8"), [r])[0] for r in asked(logprobs=2)]
    assert outputs(engine(student, "int8", threads=2), asked(logprobs=2)) == alone
    assert outputs(engine(student, "int8", max_batch_tokens=16), asked(logprobs=2)) == alone
    speculating = tiny_engine(spec(student, weights="int8", draft=student, max_draft_tokens=3))
    assert outputs(speculating, asked(logprobs=2)) == alone


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_as_a_draft_of_its_parent_it_changes_no_text(
    dtype: Any, weights: Any, kernels: str, target: Path, tmp_path: Path
):
    if kernels == "torch" and weights == "int8":
        pytest.skip("torch modules have no int8")
    student = write_tiny_student(tmp_path / "s", target, dtype=dtype, sparsity=0.3)
    recorder = Recorder()
    model = spec(target, weights=weights, draft=student, max_draft_tokens=4)
    speculating = tiny_engine(model, observer=recorder)
    got = tokens(speculating, *asked())
    assert got == tokens(engine(target, weights), *asked())
    assert got == tokens(speculating, *asked(speculation=NO_DRAFT))
    accepted = sum(r.speculation.num_accepted_draft_tokens for r in recorder.requests)
    assert accepted > 20


def test_sparse_drafts_share_tensors_and_restrict_their_vocabulary(target: Path, tmp_path: Path):
    """As a dense draft of the same form does: the artifact's other rules hold beside sparse linears."""
    known = [i for i in range(300) if i % 3]
    sparse = write_tiny_student(
        tmp_path / "sparse", target, kind="draft", sparsity=0.2, ids=known, shared_with_target=(HEAD,)
    )
    recorder = Recorder()
    model = spec(target, draft=sparse, max_draft_tokens=4)
    got = tokens(tiny_engine(model, observer=recorder), *asked())
    assert got == tokens(engine(target), *asked())
    assert sum(r.speculation.num_accepted_draft_tokens for r in recorder.requests) > 5


@pytest.mark.parametrize("reads_states", [False, True])
def test_a_student_takes_its_parents_drafts(
    reads_states: bool, kernels: str, target: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
):
    """Also those that share tensors, which they then take from the student."""
    student = write_tiny_student(tmp_path / "s", target, sparsity=0.2)
    folder = tmp_path / "draft"
    if reads_states:
        draft = write_near_feature_draft(folder, target)
    else:
        draft = write_draft(folder, target, target, shared=[EMBEDDING, HEAD])
    recorder = Recorder()
    speculating = tiny_engine(spec(student, draft=draft, max_draft_tokens=3), observer=recorder)
    assert tokens(speculating, *asked()) == tokens(engine(student), *asked())
    assert sum(r.speculation.num_accepted_draft_tokens for r in recorder.requests) > 5
    other = write_tiny_student(tmp_path / "other", tiny_checkpoint("llama", seed=4))
    with pytest.raises(ArtifactError, match="name the target that it was made for"):
        tiny_engine(spec(other, draft=draft))


def test_serving_a_student_says_that_it_is_lossy(
    target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger=parts.__name__)

    def said(model: Path, draft: Path | None = None) -> list[str]:
        caplog.clear()
        tiny_engine(spec(model, draft=draft) if draft else spec(model))
        return [message for message in caplog.messages if "student" in message]

    student = write_tiny_student(tmp_path / "s", target)
    (line,) = said(student)
    assert f"s is a student of {target}" in line
    assert "was not measured (paceline evaluate sparse" in line
    assert not said(target, student), "as a draft it is exact"
    manifest = read_manifest(student)
    assert manifest is not None
    figures = {"kl_nats": 0.25, "perplexity": 12.0, "parent_perplexity": 10.0, "dataset": "text"}
    more = {"task": "last-word", "task_accuracy": 0.31, "parent_task_accuracy": 0.4}
    for measured, says in (
        (
            {**figures, **more},
            "KL 0.250 nats, perplexity 12.00 (parent 10.00), last-word accuracy 31.0% (parent 40.0%) ",
        ),
        ({"kl_nats": "x", "dataset": "text"}, "its text is not that of its parent"),
    ):
        write_manifest(student, type(manifest)(**{**fields(manifest), "measured": (measured,)}))
        (line,) = said(student)
        assert says in line


def fields(manifest: Any) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in type(manifest).__dataclass_fields__}
