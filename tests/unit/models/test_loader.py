"""Loading models: formats, sharing, and what "auto" decides, once."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_kernels import pool, require_native

from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import PackedLinear
from paceline.server.config.machine import Machine
from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models import auto_weights, config_note, packer, quality
from paceline.server.models import loader as loader_module
from paceline.server.models.auto_weights import Decision
from paceline.server.models.checkpoint import read_json
from paceline.server.models.config import parse_model_config
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader
from paceline.server.models.packed_cache import PackedCache
from paceline.server.models.plan import PlanBuilder
from paceline.server.models.quality import Judge, Quality
from paceline.server.models.tensors import total_bytes

CPU = torch.device("cpu")


class Shown:
    """A ``Progress`` that remembers."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[int, list[int]]] = {}

    @contextmanager
    def task(self, label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        self.tasks[label] = (total_bytes, [])
        yield self.tasks[label][1].append


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def native(progress: Shown | None = None) -> ModelLoader:
    """A new one, as after a restart."""
    require_native()
    return ModelLoader(CPU, pool("portable"), progress=progress or Shown())


def formats(model: LoadedModel) -> set[str]:
    assert isinstance(model.weights, DecoderPlan)
    return {linear.format for linear in model.weights.linears}


def cached(own_cache: Path) -> list[str]:
    """Formats in the packed cache."""
    return sorted(path.name.split("-")[1] for path in own_cache.glob("*.safetensors"))


def forbid(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} must not be called")

    monkeypatch.setattr(owner, name, called)


def bar(monkeypatch: pytest.MonkeyPatch, kl: float, perplexity: float = 1.0) -> None:
    monkeypatch.setattr(quality, "MAX_KL_NATS", kl)
    monkeypatch.setattr(quality, "MAX_PERPLEXITY_CHANGE", perplexity)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_a_named_format_is_taken_without_measuring(
    format: Any, tiny_checkpoint: TinyCheckpoint, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, Judge, "measure")
    bar(monkeypatch, 0.0, 0.0)
    loader = native()
    model = loader.load(tiny_checkpoint("llama"), format)
    assert formats(model) == {format}
    assert model.kv_dtype == (torch.float32 if format == "fp32" else torch.bfloat16)
    assert model.key.endswith(f"/cpu-{format}-portable")
    assert loader.load(tiny_checkpoint("llama"), format) is model
    assert cached(own_cache) == (["int8"] if format == "int8" else [])


def test_quantizing_is_shown_and_done_once(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shown = tiny_checkpoint("qwen2"), Shown()
    first = native(shown).load(folder, "int8")
    ((label, (total, done)),) = shown.tasks.items()
    assert label == f"quantizing {folder.name} to int8"
    assert done == sorted(done)
    assert total * 0.98 < done[-1] < total * 1.02  # norms and biases are not in the total
    again = Shown()
    forbid(monkeypatch, PlanBuilder, "build")
    second = native(again).load(folder, "int8")
    assert again.tasks == {}
    assert isinstance(first.weights, DecoderPlan)
    assert isinstance(second.weights, DecoderPlan)
    for a, b in zip(first.weights.linears, second.weights.linears, strict=True):
        assert torch.equal(a.data, b.data)


def test_auto_is_int8_where_that_is_good_enough_and_measured_once(
    tiny_checkpoint: TinyCheckpoint,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    folder = tiny_checkpoint("llama")
    bar(monkeypatch, 1.0)
    loader = native()
    model = loader.load(folder, "auto")
    assert formats(model) == {"int8"}
    assert loader.load(folder, "int8") is model
    (line,) = [r.message for r in caplog.records if r.message.startswith("weights auto: int8, ")]
    assert "KL 0." in line
    assert "top-1" in line
    caplog.clear()
    forbid(monkeypatch, Judge, "measure")
    assert native().load(folder, "auto").key == model.key
    assert line in caplog.messages
    assert cached(own_cache) == ["int8"]


def test_a_decision_joins_weights_that_were_quantized_before(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    bar(monkeypatch, 1.0)
    sha256 = native().load(folder, "int8").key.split("/")[0]
    assert PackedCache(sha256, "int8").note("decision") is None
    shown = Shown()
    native(shown).load(folder, "auto")
    assert shown.tasks == {}
    about = PackedCache(sha256, "int8").note("decision")
    assert about is not None
    assert about["format"] == "int8"
    assert about["quality"]["positions"] > 1000


def test_auto_keeps_parts_in_bf16_where_int8_misses_the_bar(
    tiny_checkpoint: TinyCheckpoint,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    folder = tiny_checkpoint("llama")
    bar(monkeypatch, 0.0)
    decision = auto_weights.decide(_packer(folder))
    assert decision.format == "bf16"
    bar(monkeypatch, 1.0)
    monkeypatch.setattr(auto_weights, "_RULES", 99)  # what was decided under other rules no longer counts
    plain = auto_weights.decide(_packer(folder)).quality
    assert plain is not None
    monkeypatch.setattr(auto_weights, "_RULES", 100)
    bar(monkeypatch, plain.kl_nats * 0.7)
    caplog.clear()
    model = native().load(folder, "auto")
    assert formats(model) == {"int8", "bf16"}
    assert "cpu-mixed+" in model.key
    chosen = [r.message for r in caplog.records if r.name.endswith("loader")]
    assert len(chosen) == 1
    assert " in bf16, KL " in chosen[0]
    assert cached(own_cache) == ["int8", "mixed"]
    forbid(monkeypatch, Judge, "measure")
    forbid(monkeypatch, PlanBuilder, "build")
    again = native().load(folder, "auto")
    assert again.key == model.key
    assert formats(again) == {"int8", "bf16"}
    assert formats(native().load(folder, "int8")) == {"int8"}


@pytest.mark.parametrize("culprit", ["down", "head"])
def test_the_part_that_hurts_is_the_part_that_is_kept(
    culprit: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    bar(monkeypatch, 0.02)
    packed = _packer(folder)
    int8, bf16 = packed.plan("int8"), packed.plan("bf16")
    if culprit == "head":
        bad = replace(int8, head=_emptied(int8.head))
    else:
        layers = [replace(layer, down=_emptied(layer.down)) for layer in int8.layers]
        bad = replace(int8, layers=tuple(layers))
    judge = Judge(packed.plan("fp32"), auto_weights.calibration_windows(packed), packed.pool)
    assert not judge.measure(bad).good
    decision = auto_weights._search(judge, bad, bf16, "fp32")
    assert (decision.format, decision.kept) == ("mixed", (culprit,))


def _emptied(linear: PackedLinear) -> PackedLinear:
    """The same layer with nothing in it."""
    assert linear.scale is not None
    return replace(linear, scale=torch.zeros_like(linear.scale))


def _packer(folder: Path) -> packer.Packer:
    """As the loader makes it."""
    made: list[packer.Packer] = []

    def decide(given: packer.Packer) -> Decision:
        made.append(given)
        return Decision("int8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.server.models.loader.decide", decide)
        native().load(folder, "auto")
    return made[0]


def test_a_mixed_file_of_another_decision_is_replaced(tiny_checkpoint: TinyCheckpoint) -> None:
    packed = _packer(tiny_checkpoint("llama"))
    assert packed.plan("mixed", ["down"]).layers[0].down.format == "bf16"
    other = packed.plan("mixed", ["qkv"])
    assert (other.layers[0].down.format, other.layers[0].qkv.format) == ("int8", "bf16")
    assert packed.cache("mixed").note("kept") == ["qkv"]


def test_auto_is_bf16_where_nothing_else_will_do(
    tiny_checkpoint: TinyCheckpoint, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    bar(monkeypatch, 0.0)
    assert formats(native().load(folder, "auto")) == {"bf16"}
    forbid(monkeypatch, Judge, "measure")
    assert formats(native().load(folder, "auto")) == {"bf16"}
    assert cached(own_cache) == ["int8"]  # it carries the decision


def test_a_warm_start_parses_no_configuration(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("mistral")
    first = native().load(folder, "int8")
    with monkeypatch.context() as patch:
        forbid(patch, loader_module, "parse_model_config")
        warm = native().load(folder, "int8")
    assert warm.config == first.config
    assert hash(warm.config) == hash(first.config)  # tuples, not lists
    forbid(monkeypatch, loader_module, "parse_model_config")
    monkeypatch.setattr(config_note, "_code", lambda: "other code")
    with pytest.raises(AssertionError, match="parse_model_config"):
        native().load(folder, "int8")


def test_a_note_on_another_configuration_does_not_count(tiny_checkpoint: TinyCheckpoint) -> None:
    hf = read_json(tiny_checkpoint("llama") / "config.json")
    config = parse_model_config(hf)
    note = json.loads(json.dumps(config_note.describe(hf, config)))
    assert config_note.restore(note, hf) == config
    assert config_note.restore(note, {**hf, "rms_norm_eps": 1e-6}) is None
    assert config_note.restore(None, hf) is None


@pytest.mark.parametrize(("share", "expected"), [(0.6, "bf16"), (0.1, None)])
def test_comparison_takes_bf16_or_nothing_where_memory_is_short(
    share: float,
    expected: str | None,
    tiny_checkpoint: TinyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bar(monkeypatch, 1.0)
    packed = _packer(tiny_checkpoint("llama"))
    size = total_bytes(packed.config)
    free = SimpleNamespace(available=share * size / auto_weights._FREE_SHARE)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    decision = auto_weights.decide(packed)
    assert decision.format == "int8"
    if expected is None:
        assert decision.quality is None
        assert "without measuring it" in caplog.text
        assert packed.cache("int8").note("decision") is None  # another day there may be memory
    else:
        assert str(decision).endswith("(against bf16)")


@pytest.mark.parametrize(("flags", "expected"), [({"avx512_bf16"}, torch.bfloat16), (set(), torch.float32)])
def test_auto_with_torch(
    flags: set[str], expected: torch.dtype, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "cpu_flags", frozenset(flags))
    loader = ModelLoader(CPU)
    model = loader.load(tiny_checkpoint("llama"), "auto")
    assert isinstance(model.weights, Decoder)
    assert model.kv_dtype == expected
    assert loader.load(tiny_checkpoint("llama"), "bf16" if flags else "fp32") is model


def test_int8_needs_the_kernels(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="--weights int8 needs the native CPU kernels"):
        ModelLoader(CPU).load(tiny_checkpoint("llama"), "int8")


def test_a_checkpoint_that_contradicts_its_configuration(tmp_path: Path) -> None:
    from tiny import write_tiny_checkpoint

    folder = write_tiny_checkpoint(tmp_path / "model", "llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(ArtifactError, match=r"mlp\.gate_proj\.weight is \(96, 64\), but .* says \(80, 64\)"):
        native().load(folder, "int8")
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ArtifactError, match=r"tensor model\.layers\.2\..* is missing"):
        native().load(folder, "fp32")


def test_decisions_read_well() -> None:
    figures = Quality(0.0081, 10.08, 10.0, 0.949, 4000)
    assert str(Decision("int8", (), figures)) == "int8, KL 0.0081, perplexity +0.80%, top-1 94.9%"
    kept = Decision("mixed", ("down", "first block"), figures)
    assert str(kept).startswith("int8 with down, first block in bf16, KL 0.0081")
    assert str(Decision("int8")) == "int8"
