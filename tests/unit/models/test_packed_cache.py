"""Packed weights on disk: what comes back is what was saved, and a file that cannot be used is packed again."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from native_kernels import load_plan, require_native
from torch import Tensor

from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.formats import Format, PackedLinear
from paceline.server.models import packed_cache
from paceline.server.models.checkpoint import read_json
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.packed_cache import PackedCache
from paceline.server.models.packer import mix

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


def plan_of(folder: Path, format: Format = "int8") -> tuple[DecoderPlan, ModelConfig]:
    return load_plan(folder, format), parse_model_config(read_json(folder / "config.json"))


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, DecoderPlan | LayerPlan | PackedLinear):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_plan_comes_back_as_it_was(arch: Any, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(arch, tie_word_embeddings=True)  # one tensor under two names
    plan, config = plan_of(folder)
    cache = PackedCache("ab" * 32, "int8")
    assert cache.load(config) is None
    cache.save(plan)
    loaded = cache.load(config)
    assert loaded is not None
    assert_same(loaded, plan)
    assert cache.note("about") is None
    assert PackedCache("cd" * 32, "int8").load(config) is None
    assert PackedCache("ab" * 32, "mixed").load(config) is None


def test_mixed_formats_and_the_note(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    int8, config = plan_of(folder)
    plan = mix(int8, plan_of(folder, "bf16")[0], ["down", "first block"])
    cache = PackedCache("ab" * 32, "mixed")
    cache.save(int8, {"kept": [], "old": 1})
    note = {"kept": ["down", "first block"], "kl": 0.25, "none": None}
    cache.save(plan, {"a": note, "b": "B"})
    loaded = cache.load(config)
    assert loaded is not None
    assert_same(loaded, plan)
    assert (cache.note("a"), cache.note("b"), cache.note("old")) == (note, "B", None)


@pytest.mark.parametrize("damage", ["cut", "noise", "other"])
def test_an_unusable_file_is_reported_and_ignored(
    damage: str, tiny_checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    plan, config = plan_of(tiny_checkpoint("llama"))
    cache = PackedCache("ab" * 32, "int8")
    cache.save(plan, {"a": 1})
    whole = cache.path.read_bytes()
    if damage == "other":  # a model of another depth: no damage, but not this one either
        config = plan_of(tiny_checkpoint("llama", num_hidden_layers=3))[1]
    else:
        cache.path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else bytes(100) + whole[100:])
    with caplog.at_level(logging.WARNING):
        assert cache.load(config) is None
    assert [r.message for r in caplog.records if "packing again" in r.message] == (
        [] if damage == "other" else [r.message for r in caplog.records]
    )
    assert len(caplog.records) == (damage != "other")
    assert (cache.note("a") is None) == (damage != "other")


def test_a_new_layout_leaves_old_files_alone(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, config = plan_of(tiny_checkpoint("llama"))
    PackedCache("ab" * 32, "int8").save(plan)
    monkeypatch.setattr(packed_cache, "LAYOUT_VERSION", packed_cache.LAYOUT_VERSION + 1)
    assert PackedCache("ab" * 32, "int8").load(config) is None


def test_a_disk_that_refuses_costs_only_the_cache(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan, config = plan_of(tiny_checkpoint("llama"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "file"))
    cache = PackedCache("ab" * 32, "int8")
    cache.save(plan)
    assert "packed weights are not cached" in caplog.text
    assert cache.load(config) is None
