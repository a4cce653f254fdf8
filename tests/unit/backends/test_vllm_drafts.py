"""Draft artifacts as vLLM loads them: plain folders made once, the right method, what does not fit."""

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import HEAD, write_draft, write_feature_draft
from safetensors.torch import load_file

from paceline.server.backends.vllm.speculation import Speculation, find_speculation
from paceline.server.config.schema import ModelSpec, SpeculationConfig
from paceline.server.errors import ArtifactError
from paceline.server.models.standalone import plain_draft, plain_folder
from paceline.server.models.tokenizer import load_tokenizer

CHOSEN = list(range(3, 300, 7))


def speculation(target: Path, draft: Path) -> Speculation | None:
    spec = ModelSpec("m", str(target), speculation=SpeculationConfig(draft=str(draft), max_draft_tokens=3))
    return find_speculation(spec, target, load_tokenizer(target), greedy_only=False)


def test_an_independent_artifact_becomes_a_plain_draft_model_once(
    own_cache: Path, target: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = write_draft(
        tmp_path / "own",
        target,
        tiny_checkpoint("llama", seed=1),
        ids=CHOSEN,
        shared=(HEAD,),
        dtype=torch.bfloat16,
    )
    found = speculation(target, folder)
    assert found is not None
    assert found.name == "own"
    assert found.config["method"] == "draft_model"
    assert found.config["num_speculative_tokens"] == 3
    assert found.config["rejection_sample_method"] == "standard"
    assert found.config["draft_sample_method"] == "probabilistic"
    assert found.unseeded
    plain = Path(str(found.config["model"]))
    assert plain.parent == own_cache / "plain"
    assert load_file(plain / "model.safetensors")[HEAD].shape[0] == 300  # all ids
    written = (plain / "model.safetensors").stat().st_mtime_ns
    assert plain_draft(folder, target) == plain
    assert (plain / "model.safetensors").stat().st_mtime_ns == written


def test_one_that_reads_states_becomes_eagle(own_cache: Path, target: Path, tmp_path: Path) -> None:
    found = speculation(target, write_feature_draft(tmp_path / "feature", target))
    assert found is not None
    assert found.config["method"] == "eagle"


def test_a_plain_checkpoint_is_taken_as_it_is(
    own_cache: Path, target: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    draft = tiny_checkpoint("llama", seed=1)
    found = speculation(target, draft)
    assert found is not None
    assert (found.config["model"], found.config["method"]) == (str(draft), "draft_model")
    assert plain_folder(target) == target
    assert not own_cache.exists()


def test_a_draft_of_another_target_is_refused(
    own_cache: Path, target: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path / "own", target, tiny_checkpoint("llama", seed=1), shared=(HEAD,))
    with pytest.raises(ArtifactError, match="name the target that it was made for"):
        speculation(tiny_checkpoint("llama", seed=2), folder)
