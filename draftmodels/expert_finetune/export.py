"""From an expert in training to a plain Hugging Face checkpoint with its tokenizer and a manifest.

The same path for the expert that is kept during training and for the one that is shipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paceline.draftmodels.finetune.arithmetic import DTYPES
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.server.errors import ArtifactError
from paceline.server.models.folders import complete_or_nothing, copy_tokenizer, write_checkpoint
from paceline.server.models.manifest import Base, Manifest, read_manifest, write_manifest

_HF_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class ExpertAbout:
    """What an expert's folder says about itself beside its weights.

    Attributes:
        parent: folder or file of the model that training started from: the tokenizer is copied from there.
        hf_config: the parent's ``config.json``.
        store: type of the weights.
    """

    base: Base
    parent: Path
    hf_config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    store: Literal["bf16", "fp32"]


def export_expert(
    folder: Path, model: Decoder, about: ExpertAbout, measured: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the expert as it is now; a folder that is there is replaced as a whole.

    Raises:
        ArtifactError: it cannot be written.
    """
    config = {**about.hf_config, "torch_dtype": _HF_DTYPES[about.store]}
    config.pop("dtype", None)  # newer name of the same; transformers would take it first
    tensors = {name: tensor.detach().to(DTYPES[about.store]) for name, tensor in model.state_dict().items()}
    manifest = Manifest(
        kind="expert",
        base=about.base,
        weights={"format": about.store},
        recipe=about.recipe,
        provenance=about.provenance,
        measured=tuple(measured),
    )
    with complete_or_nothing(folder) as temporary:
        write_checkpoint(temporary, config, tensors)
        copy_tokenizer(about.parent, temporary)
        write_manifest(temporary, manifest)


def add_measured(folder: Path, figures: Mapping[str, Any]) -> None:
    """Add figures to the latest ones of a manifest.

    Raises:
        ArtifactError: there is none.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.measured:
        raise ArtifactError(f"{folder} has no measured figures to add to")
    *before, latest = manifest.measured
    write_manifest(folder, replace(manifest, measured=(*before, {**latest, **figures})))
