"""Models and drafts that a plan names, read as far as arithmetic needs them: configuration and manifest, no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.checkpoint import open_checkpoint, read_json
from paceline.server.models.config import ModelConfig, parse_model_config, restricted
from paceline.server.models.manifest import MANIFEST, Manifest, read_manifest
from paceline.server.models.native_form import NativeCheckpoint, is_native_form
from paceline.server.models.sources import resolve_config
from paceline.server.models.sparse_form import SparseForm, sparse_names
from paceline.server.planning.footprint import WEIGHTS, Weights

#: A draft that takes no forwards.
NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model without its weights.

    Attributes:
        weights: format that an artifact is stored in; None for a plain checkpoint, which runs in any.
        sparsity: share of the blocks' weights that its files leave out.
        manifest: of an artifact.
    """

    name: str
    config: ModelConfig
    weights: Weights | None = None
    sparsity: float = 0.0
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An acceptance rate, and who says so."""

    alpha: float
    source: str


def read_model(reference: str) -> ModelFacts:
    """The model that a reference names, or a ``config.json``.

    Raises:
        UserError: it names nothing, is broken, or of a family that is not known.
    """
    path = resolve_config(reference)
    name = Path(reference).name if Path(reference).exists() else reference
    if path.suffix == ".json":
        return ModelFacts(name, parse_model_config(read_json(path), where=str(path)))
    if path.suffix == ".gguf":
        return ModelFacts(name, parse_model_config(open_checkpoint(path).hf_config, where=str(path)))
    if is_native_form(path):
        return _read_artifact(name, path)
    config = path / "config.json"
    return ModelFacts(
        name, parse_model_config(read_json(config), where=str(config)), manifest=read_manifest(path)
    )


def acceptance(facts: ModelFacts) -> Acceptance:
    """The least acceptance rate that a draft's manifest has measured.

    Raises:
        ConfigError: nothing was measured, so that it must be given.
    """
    entries = () if facts.manifest is None else facts.manifest.measured
    rates = [(rate, entry) for entry in entries if (rate := _rate(entry)) is not None]
    if not rates:
        raise ConfigError(
            f"--draft: no acceptance rate is recorded for {facts.name}; measure it with paceline evaluate draft "
            "TARGET --draft DRAFT --record, or give --alpha"
        )
    rate, entry = min(rates, key=lambda one: one[0])
    temperature = entry.get("temperature")
    at = "" if temperature is None else f" at temperature {temperature:g}"
    return Acceptance(rate, f"least of those in its {MANIFEST}: {entry.get('dataset', 'unnamed text')}{at}")


def _rate(entry: Mapping[str, Any]) -> float | None:
    """Manifests are written by anyone."""
    rate = entry.get("alpha")
    usable = isinstance(rate, int | float) and not isinstance(rate, bool) and 0.0 <= rate <= 1.0
    return float(rate) if usable and rate is not None else None


def _read_artifact(name: str, path: Path) -> ModelFacts:
    checkpoint = NativeCheckpoint(path)
    where = str(path / "config.json")
    config = restricted(parse_model_config(checkpoint.hf_config, where=where), checkpoint.draft_vocab)
    form = checkpoint.sparse_form
    stored = form.value_dtype if form is not None else checkpoint.manifest.weights["format"]
    weights: Weights = next((known for known in WEIGHTS if known == stored), "bf16")  # fp16 runs as bf16
    sparsity = 0.0 if form is None else _sparsity(path, config, form)
    return ModelFacts(name, config, weights, sparsity, checkpoint.manifest)


def _sparsity(folder: Path, config: ModelConfig, form: SparseForm) -> float:
    """Share of the blocks' weights that is left out, from the headers of the files: no tensor is read."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            sizes |= {name: prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    dense = sum(
        prod(config.tensor_shape(name)) for name in config.tensor_names() if name.endswith("_proj.weight")
    )
    left_out = sum(
        prod(config.tensor_shape(name)) - sizes[form.parts(name)[1]] for name in sparse_names(sizes)
    )
    if not 0 <= left_out < dense:
        raise ArtifactError(f"{folder}: its sparse weights do not fit its configuration")
    return left_out / dense
