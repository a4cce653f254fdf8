"""Where drafts start, and that what is exported is what was trained: the engine's own reader opens every artifact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_job import VOCAB_IDS, small_recipe
from native_drafts import base_of

from paceline.draftmodels.distill.export import ArtifactAbout, export_draft
from paceline.draftmodels.distill.initialise import NewDraft, new_draft, own_vocab
from paceline.draftmodels.distill.modules import FeatureDraft, IndependentDraft
from paceline.draftmodels.distill.objective import Rows
from paceline.draftmodels.distill.report import write_report
from paceline.draftmodels.distill.vocab import expected_vocabulary
from paceline.draftmodels.teacher import TeacherRows
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import EMBEDDING, HEAD
from paceline.server.models.native_form import NativeCheckpoint


def start(target: Path, ids: torch.Tensor | None = VOCAB_IDS, **changes: Any) -> NewDraft:
    return new_draft(small_recipe(**changes), open_checkpoint(target), ids)


def export(folder: Path, target: Path, new: NewDraft) -> NativeCheckpoint:
    about = ArtifactAbout(base_of(target), target, {"loss": "fkl"}, {"seed": 0})
    export_draft(folder, new, about, [{"tau": 1.5}])
    return NativeCheckpoint(folder, open_checkpoint(target))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("ids", [None, VOCAB_IDS], ids=["full", "restricted"])
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, FeatureDraft),
        ({"layers": 2, "block_from": "0"}, FeatureDraft),
        ({"train_head": True}, FeatureDraft),
        ({"init": "layers:1"}, IndependentDraft),
        ({"init": "layers:1,0", "train_head": True, "train_embedding": True}, IndependentDraft),
        (
            {"init": "random", "layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64},
            IndependentDraft,
        ),
        ({"init": "random"}, IndependentDraft),
    ],
    ids=["feature", "feature-2", "feature-head", "cut", "cut-all", "random", "random-shared"],
)
def test_every_start_makes_an_artifact_that_says_what_was_trained(
    tiny_checkpoint: Any, tmp_path: Path, arch: str, ids: Any, changes: dict[str, Any], kind: type
) -> None:
    target = tiny_checkpoint(arch)
    new = start(target, ids, **changes)
    assert isinstance(new.draft, kind)
    with torch.no_grad():
        for parameter in new.draft.trained().values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    artifact = export(tmp_path / "draft", target, new)
    assert artifact.manifest.measured == ({"tau": 1.5},)
    assert set(artifact.manifest.shared_with_target).isdisjoint(new.draft.trained())
    for name, tensor in new.draft.state_dict().items():
        if name == HEAD and HEAD not in artifact.tensor_names():
            continue  # tied
        stored = artifact.tensor(name).float()
        step = tensor.float().abs().amax(-1, keepdim=True) / 100
        assert ((stored - tensor.float()).abs() <= step + 1e-6).all(), name


def test_frozen_matrices_of_the_target_are_not_stored_again(tiny_checkpoint: Any, tmp_path: Path) -> None:
    untied, tied = tiny_checkpoint(), tiny_checkpoint("qwen2")
    assert start(untied).shared == (EMBEDDING, HEAD)
    assert start(tied).shared == (EMBEDDING,)
    assert start(untied, train_head=True).shared == (EMBEDDING,)
    assert start(untied, init="random", hidden=32).shared == ()
    export(tmp_path / "draft", tied, start(tied))
    stored = NativeCheckpoint(tmp_path / "draft")._stored.tensor_names()
    assert not {EMBEDDING, HEAD} & set(stored)


def test_a_feature_draft_starts_with_the_state_passing_through(tiny_checkpoint: Any) -> None:
    target = open_checkpoint(tiny_checkpoint())
    name = "mlp.gate_proj.weight"
    random = start(tiny_checkpoint()).draft.state_dict()
    assert float(random[f"model.layers.0.{name}"].std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(random["model.fc.weight"][:, 64:], torch.eye(64))
    knows_nothing = start(tiny_checkpoint(), join_from="random").draft.state_dict()["model.fc.weight"]
    assert float(knows_nothing.std()) == pytest.approx(0.02, rel=0.1)
    copied = start(tiny_checkpoint(), block_from="0", layers=2).draft.state_dict()
    for layer in (0, 1):
        assert torch.equal(
            copied[f"model.layers.{layer}.{name}"], target.tensor(f"model.layers.{layer}.{name}")
        )
    normed = torch.randn(5, 64)  # before any norm's weights
    query = "model.layers.0.self_attn.q_proj.weight"
    theirs = (normed * target.tensor("model.layers.0.input_layernorm.weight")) @ target.tensor(query).T
    ours = (normed * target.tensor("model.norm.weight")) @ copied[query].T
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    down = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(copied[down], 0.02 * target.tensor(down))


def test_training_goes_on_from_an_artifact(tiny_checkpoint: Any, tmp_path: Path) -> None:
    target = tiny_checkpoint()
    new = start(target)
    export(tmp_path / "draft", target, new)
    recipe = small_recipe(init=str(tmp_path / "draft"), draft_vocab=None)
    fixed, ids = own_vocab(recipe, open_checkpoint(target))
    assert fixed
    assert ids is not None
    again = new_draft(recipe, open_checkpoint(target), ids)
    assert isinstance(again.draft, FeatureDraft)
    assert again.shared == new.shared
    for name, tensor in again.draft.trained().items():
        before = new.draft.trained()[name]
        assert (tensor - before).abs().max() <= before.abs().max() / 100, name
    with pytest.raises(ConfigError, match="150 ids already"):
        own_vocab(small_recipe(init=str(tmp_path / "draft")), open_checkpoint(target))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "layers:7"}, "layer 7 does not exist"),
        ({"init": "random", "hidden": 30, "heads": 4}, "hidden 30"),
        ({"block_from": "2"}, "layers 0 to 1"),
        ({"block_from": "x"}, "block_from"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_checkpoint: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start(tiny_checkpoint(), **changes)


def test_a_draft_vocabulary_follows_expected_counts() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.1], [0.6, 0.3, 0.05]])
    rows: list[Rows] = [
        TeacherRows(
            torch.zeros(3, 2), probabilities.log(), torch.tensor([[7, 4, 9], [4, 9, 2]]), torch.zeros(2)
        )
    ]
    ids, mass = expected_vocabulary(rows, 3, vocab_size=10, always=[1])
    assert ids.tolist() == [1, 4, 7]  # 4: 0.9, 7: 0.5, 9: 0.4
    assert mass == pytest.approx((0.9 + 0.5) / 2)
    filled, _ = expected_vocabulary(rows, 7, vocab_size=10)
    assert filled.tolist() == [0, 1, 2, 3, 4, 7, 9]
    with pytest.raises(ConfigError, match="draft_vocab"):
        expected_vocabulary(rows, 11, vocab_size=10)


def test_a_report_is_one_file_with_its_pictures_inside(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": i, "tokens": 10 * i, "loss": 3 / i, "losses": [2 / i, 4 / i], "alphas": [0.5, 0.4]}
        for i in range(1, 5)
    ]
    for step in (0, 4):
        measured = {"tokens": 10 * step, "tau": 1.5, "alpha_per_position": [0.5, 0.2]}
        lines.append({"step": step, "measured": measured})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path, {"recipe": {"loss": "<fkl>"}}).read_text()
    assert page.count("data:image/png;base64,iVBOR") == 3
    assert "&lt;fkl&gt;" in page
    assert "http" not in page
