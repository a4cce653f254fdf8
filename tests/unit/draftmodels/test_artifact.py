"""Writing drafts in native form: complete and consistent, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_drafts import EMBEDDING, HEAD, IDS, Tensors, base_of, write_draft
from safetensors.torch import load_file

from paceline.draftmodels import artifact
from paceline.draftmodels.artifact import int8_linears, native_config, write_native_draft
from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.checkpoint import read_json
from paceline.server.models.manifest import Manifest, read_manifest
from paceline.server.models.native_form import NativeCheckpoint
from paceline.server.models.tokenizer import load_tokenizer

CHOSEN = list(range(0, 300, 11))


@pytest.fixture
def draft(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", seed=1)


def test_everything_comes_back(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, shared=[EMBEDDING], int8=True)
    written = NativeCheckpoint(folder)
    assert written.draft_vocab is not None
    assert written.draft_vocab.tolist() == CHOSEN
    assert written.manifest == read_manifest(folder)
    assert written.manifest.base == base_of(target)
    originals = load_file(draft / "model.safetensors")
    assert set(written.tensor_names()) == set(originals)
    for name in set(originals) - {EMBEDDING}:
        expected = originals[name][CHOSEN] if name == HEAD else originals[name]
        step = expected.abs().amax() / 127
        torch.testing.assert_close(written.tensor(name), expected, rtol=0, atol=float(step) * 0.51)
    assert load_tokenizer(folder).sha256 == load_tokenizer(target).sha256
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_int8_takes_linears_and_leaves_the_rest(draft: Path) -> None:
    tensors = load_file(draft / "model.safetensors")
    quantized = int8_linears(tensors)
    linears = {name for name in tensors if name.endswith("_proj.weight")} | {HEAD}
    assert {name for name, tensor in quantized.items() if tensor.dtype is torch.int8} == linears
    assert set(quantized) == set(tensors) | {f"{name}_scale" for name in linears}
    assert all(quantized[name] is tensors[name] for name in tensors if name not in linears)


def test_tensors_that_share_memory_are_written(target: Path, draft: Path, tmp_path: Path) -> None:
    """As a model's embedding and a slice of it do."""

    def tie(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING]

    folder = write_draft(tmp_path / "draft", target, draft, edit=tie)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored[HEAD], stored[EMBEDDING])


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name])

    return edit


def extra(tensors: Tensors) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def gone(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


WRONG: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (gone, "tensor model.norm.weight is missing"),
    "left over": (extra, "tensor model.layers.9.mlp.up_proj.weight is not of this model"),
    "shape": (change("model.norm.weight", lambda w: w[1:]), r"model.norm.weight is \(63,\)"),
    "unsorted": (change(IDS, lambda ids: ids.flip(0)), "must hold ascending ids"),
    "head rows": (change(HEAD, lambda w: w[1:]), "has 27 rows, but draft_vocab_ids lists 28 ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_draft_that_does_not_fit_itself_is_not_written(
    case: str, target: Path, draft: Path, tmp_path: Path
) -> None:
    edit, says = WRONG[case]
    with pytest.raises(ArtifactError, match=says) as caught:
        write_draft(tmp_path / "draft", target, draft, ids=CHOSEN, edit=edit)
    assert str(caught.value).startswith(str(tmp_path / "draft"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_only_replaced_with_force(
    target: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_draft(tmp_path / "draft", target, draft, ids=CHOSEN)
    with pytest.raises(ConfigError, match="--force"):
        write_draft(tmp_path / "draft", target, draft)
    arguments: dict[str, Any] = {
        "config": read_json(draft / "config.json"),
        "tensors": load_file(draft / "model.safetensors"),
        "manifest": Manifest("draft", base_of(target), {"format": "fp32"}),
        "tokenizer_from": target,
        "force": True,
    }

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "copy_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_native_draft(tmp_path / "draft", **arguments)
    assert NativeCheckpoint(tmp_path / "draft").draft_vocab is not None
    write_native_draft(tmp_path / "draft", **arguments)
    assert NativeCheckpoint(tmp_path / "draft").draft_vocab is None
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_configuration_must_name_its_architecture() -> None:
    assert native_config({"architectures": ["X"], "a": 1}) == {
        "architectures": ["PacelineForCausalLM"],
        "base_architecture": "X",
        "a": 1,
    }
    with pytest.raises(ArtifactError, match="lacks architectures"):
        native_config({"model_type": "llama"})
