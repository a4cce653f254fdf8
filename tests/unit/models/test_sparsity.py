"""How much of a model is left out, as the served model says it: beside a count of what is stored, linear by linear."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from engines import spec, tiny_engine
from sparse_students import write_tiny_student

from paceline.draftmodels.evaluate.sparse.sizes import overall, sparsity_per_layer
from paceline.server.engine.interface import WeightsInfo
from paceline.server.models.loader import ModelLoader
from paceline.server.models.native_form import open_model
from paceline.server.models.sparsity import Sparsity

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "about"), [("unstructured", 0.7, 0.7), ("2:4", 0.5, 0.5), ("16:32", 0.5, 0.5)]
)
def test_it_is_what_was_pruned(
    pattern: str, sparsity: float, about: float, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    student = write_tiny_student(
        tmp_path / "s", tiny_checkpoint("llama"), pattern=pattern, dtype="int8", sparsity=sparsity
    )
    loaded = ModelLoader(torch.device("cpu")).load(student, "fp32")
    assert loaded.sparsity.pattern == pattern
    assert loaded.sparsity.share == pytest.approx(about, abs=0.02)
    counted = overall(sparsity_per_layer(open_model(student), loaded.config))
    assert loaded.sparsity.share == pytest.approx(counted, abs=1e-9)


def test_a_plain_checkpoint_is_dense(tiny_checkpoint: TinyCheckpoint) -> None:
    loaded = ModelLoader(torch.device("cpu")).load(tiny_checkpoint("llama"), "bf16")
    assert (loaded.format, loaded.sparsity) == ("bf16", Sparsity("dense", 0.0))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_served_model_tells(weights: Any, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    student = write_tiny_student(tmp_path / "s", tiny_checkpoint("llama"), pattern="2:4", dtype=weights)
    engine = tiny_engine(spec(student, weights=weights, draft=None))
    said = engine._models["m"].info.weights
    assert (said.format, said.pattern) == (weights, "2:4")
    assert said.sparsity == pytest.approx(0.5)
    plain = tiny_engine(spec(tiny_checkpoint("llama"), weights="fp32", draft=None))
    assert plain._models["m"].info.weights == WeightsInfo("fp32")
