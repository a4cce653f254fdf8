"""From a draft in training to the artifact that the engine loads: int8, native form, with recipe and measured figures.

The same path for the draft that is measured during training and for the one that is shipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.artifact import int8_linears, write_native_draft
from paceline.draftmodels.distill.initialise import NewDraft
from paceline.server.models.config import HEAD
from paceline.server.models.manifest import Base, Manifest

VOCAB_IDS = "draft_vocab_ids"


@dataclass(frozen=True)
class ArtifactAbout:
    """What an artifact says about itself beside its weights.

    Attributes:
        target: folder or file that the tokenizer is copied from.
        steering: the pairs whose combination the draft was made for; none for a plain target. The draft serves any
            model over its base, as no draft changes what comes out.
    """

    base: Base
    target: Path
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    steering: Sequence[Mapping[str, Any]] = ()


def export_draft(
    folder: Path, new: NewDraft, about: ArtifactAbout, measured: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the draft as it is now; a folder that is there is replaced as a whole.

    Raises:
        ArtifactError: it cannot be written.
    """
    manifest = Manifest(
        kind="draft",
        base=about.base,
        weights={"format": "int8"},
        shared_with_target=new.shared,
        draft_vocab=None if new.vocab_ids is None else VOCAB_IDS,
        recipe=about.recipe,
        provenance=about.provenance,
        measured=tuple(measured),
        extra={"steering": list(about.steering)} if about.steering else {},
    )
    write_native_draft(
        folder,
        config=dict(new.hf_config),
        tensors=artifact_tensors(new),
        manifest=manifest,
        tokenizer_from=about.target,
        force=True,
    )


def artifact_tensors(new: NewDraft) -> dict[str, Tensor]:
    """What the artifact stores: not what it takes from the target, nor a head that is rows of the embedding."""
    own = {name: tensor.detach().cpu() for name, tensor in new.draft.checkpoint_tensors().items()}
    left_out = set(new.shared) | ({HEAD} if new.hf_config.get("tie_word_embeddings") else set())
    kept = {name: tensor for name, tensor in own.items() if name not in left_out}
    # Matrices that stay floats (an embedding) in bf16, as checkpoints hold them; int8 is made from fp32.
    tensors = {
        name: tensor.to(torch.bfloat16) if "embed_tokens" in name else tensor.float()
        for name, tensor in kept.items()
    }
    tensors = int8_linears(tensors)
    if new.vocab_ids is not None:
        tensors[VOCAB_IDS] = new.vocab_ids.to(torch.int32)
    return tensors
