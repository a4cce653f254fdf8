"""Cutting layers out of tiny targets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from paceline.draftmodels import cut
from paceline.draftmodels.cli import init_draft
from paceline.draftmodels.cut import cut_config, cut_draft, parse_layers
from paceline.server.errors import ArtifactError, ConfigError, UnsupportedModelError
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.manifest import read_manifest
from paceline.server.models.tokenizer import load_tokenizer

TinyCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_the_draft_is_a_checkpoint_whose_layers_are_the_targets(
    arch: tiny.Arch, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    target = tiny_checkpoint(arch, num_hidden_layers=4)
    kept = [0, 3]
    cut_draft(str(target), kept, tmp_path / "draft")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 2
    original = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    expected = {
        name: tensor for name, tensor in original.state_dict().items() if not name.startswith("model.layers.")
    }
    for new, old in enumerate(kept):
        for name, tensor in original.model.layers[old].state_dict().items():
            expected[f"model.layers.{new}.{name}"] = tensor
    assert set(model.state_dict()) == set(expected)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_the_tokenizer_comes_along(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target = tiny_checkpoint("llama")
    cut_draft(str(target), [1], tmp_path / "draft")

    messages = [{"role": "user", "content": "the onion"}]
    ours, theirs = load_tokenizer(tmp_path / "draft"), load_tokenizer(target)
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert ours.sha256 == theirs.sha256
    assert AutoTokenizer.from_pretrained(tmp_path / "draft").encode("the") == theirs.encode("the")


def test_the_manifest_says_what_it_was_made_of(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target = tiny_checkpoint("llama")
    cut_draft(str(target), [1, 0], tmp_path / "draft")

    manifest = read_manifest(tmp_path / "draft")

    assert manifest is not None
    assert manifest.kind == "draft"
    assert manifest.base.id == str(target)
    assert manifest.base.vocab_size == 300
    assert manifest.base.tokenizer_sha256 == load_tokenizer(target).sha256
    assert manifest.base.weights_sha256 == open_checkpoint(target).weights_sha256()
    assert manifest.weights == {"format": "bf16"}
    assert manifest.recipe == {"init": {"method": "cut", "layers": [1, 0]}}
    assert set(manifest.provenance) == {"git", "versions", "argv", "seed", "date"}
    assert "torch" in manifest.provenance["versions"]


def test_fields_that_count_layers_follow() -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "max_window_layers": 2,
        "keep": [1, 2, 3, 4],
    }
    cut_down = cut_config(config, [3, 0])

    assert cut_down["num_hidden_layers"] == 2
    assert cut_down["layer_types"] == ["d", "a"]
    assert cut_down["max_window_layers"] == 1
    assert cut_down["keep"] == [1, 2, 3, 4]
    assert config["num_hidden_layers"] == 4


def test_which_layers_slide_stays_with_the_layer() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 4, "max_window_layers": 3, "use_sliding_window": True}
    assert cut_config(config, [3, 1])["layer_types"] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("0,x", "'x'"),
        ("0,-1", "'-1'"),
        ("1,2,1", "layer 1 twice"),
        ("²", "'²'"),
    ],
)
def test_layers_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_layers(text)
    assert parse_layers("0, 3,2,") == (0, 3, 2)


def test_a_layer_the_target_lacks_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target = str(tiny_checkpoint("llama"))
    for layers in ([0, 2], [], [1, 1]):
        with pytest.raises(ConfigError, match="layers 0 to 1"):
            cut_draft(target, layers, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_what_is_there_is_only_replaced_with_force(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target, draft = str(tiny_checkpoint("llama")), tmp_path / "draft"
    draft.mkdir()
    cut_draft(target, [0], draft)  # empty is fine
    (draft / "mine.txt").write_text("x")

    with pytest.raises(ConfigError, match="--force"):
        cut_draft(target, [1], draft)
    assert (draft / "mine.txt").exists()

    cut_draft(target, [0, 1], draft, force=True)
    assert not (draft / "mine.txt").exists()
    assert json.loads((draft / "config.json").read_text())["num_hidden_layers"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]

    with pytest.raises(ConfigError, match="is a file"):
        cut_draft(target, [0], draft / "config.json")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_cut_leaves_what_was_there(
    failure: BaseException,
    existing: bool,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = tmp_path / "draft"
    if existing:
        draft.mkdir()
        (draft / "mine.txt").write_text("x")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(cut, "_write_manifest", fail)
    with pytest.raises((KeyboardInterrupt, ArtifactError)):
        cut_draft(str(tiny_checkpoint("llama")), [0], draft, force=True)

    assert [path.name for path in tmp_path.rglob("*")] == (["draft", "mine.txt"] if existing else [])


def test_a_target_that_does_not_run_here_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    target = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))

    with pytest.raises(UnsupportedModelError, match="gpt2"):
        cut_draft(str(target), [0], tmp_path / "draft")


def test_the_command_prints_text_or_json(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("init-draft")(init_draft)
    arguments = [str(tiny_checkpoint("llama")), "--layers", "0", "-o"]

    text = CliRunner().invoke(app, [*arguments, str(tmp_path / "a")])
    assert text.exit_code == 0, text.output
    assert "1 layers of" in text.output

    as_json = CliRunner().invoke(app, [*arguments, str(tmp_path / "b"), "--json"])
    facts = json.loads(as_json.output)
    assert facts["layers"] == [0]
    assert facts["parameters"] == sum(
        tensor.numel() for tensor in load_file(tmp_path / "b" / "model.safetensors").values()
    )
