"""The whole pipeline on a tiny model: prune it, recover it, train a draft for the student, serve the two together."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from engines import Recorder, request, spec, tiny_engine, tokens
from native_kernels import require_native

from paceline.clients import console
from paceline.server.engine.request import Request
from paceline.server.errors import ArtifactError
from paceline.server.models.native_form import NativeCheckpoint

DRAFTS = {
    "feature": ("--init", "feature", "--draft-vocab", "200", "--lr", "1e-2", "--max-steps", "60"),
    "cut": ("--init", "layers:0", "--source", "mixed", "--max-steps", "24"),
}
SMALL_SPARSE = "--batch-tokens 60 --held-out 2 --eval-every 3 --threads 1 --lr 3e-3 --warm-up 2 --max-steps 6"
SMALL_DRAFT = (
    "--round-prompts 8 --answer-tokens 12 --batch-tokens 60 --held-out 2 --eval-tokens 8 --eval-rounds 8 "
    "--streams 8 --threads 1 --precision fp32"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["one", "two three", "four", "on the sea", "here", "there it is", "is it", "at once", "the stone"]
    lines = [json.dumps({"prompt": word, "answer": f"an answer to {word}"}) + "\n" for word in words]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def student(tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by SparseGPT, recovered with SquareHead, stored in int8."""
    require_native()
    folder = tmp_path_factory.mktemp("student")
    small = "--samples 6 --held-out 2 --sequence-tokens 32 --values fp32 --threads 1"
    parent, pruned = str(tiny_checkpoint("llama")), str(folder / "pruned")
    assert console.main(["sparsify", parent, "-o", pruned, "--calibration", str(text), *small.split()]) == 0
    recovery = ["train-sparse", pruned, "--data", str(text), "-o", str(folder / "run")]
    assert console.main([*recovery, *SMALL_SPARSE.split()]) == 0
    return folder / "run" / "best"


def asked(**common: Any) -> list[Request]:
    prompts = [[5, 9, 17], [40, 41, 42, 43, 44, 45], [200, 7]]
    wishes: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 5, "top_p": 0.9}]
    return [request(p, ignore_eos=True, **wish, **common) for p in prompts for wish in wishes]


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_students_own_draft_changes_no_text(
    kind: str, student: Path, text: Path, tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    command = ["train-draft", str(student), "--prompts", str(text), "-o", str(tmp_path / "run")]
    assert console.main([*command, *SMALL_DRAFT.split(), *DRAFTS[kind]]) == 0
    draft = tmp_path / "run" / "best"
    base = NativeCheckpoint(draft, NativeCheckpoint(student)).manifest.base
    assert base.weights_sha256 == NativeCheckpoint(student).weights_sha256()

    recorder = Recorder()
    model = spec(student, weights="int8", draft=draft, max_draft_tokens=3)
    assert tokens(tiny_engine(model, observer=recorder), *asked()) == tokens(
        tiny_engine(spec(student, weights="int8", draft=None)), *asked()
    )
    assert sum(r.speculation.num_accepted_draft_tokens for r in recorder.requests) > 3
    # What it takes from the student is not in the parent: another model by its hash.
    with pytest.raises(ArtifactError, match="name the target that it was made for"):
        tiny_engine(spec(tiny_checkpoint("llama"), draft=draft))
