"""Drafts in native form for tests, made of tiny plain checkpoints."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from paceline.draftmodels.artifact import int8_linears, write_native_draft
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.manifest import Base, Manifest
from paceline.server.models.tokenizer import load_tokenizer

EMBEDDING, HEAD, IDS = "model.embed_tokens.weight", "lm_head.weight", "draft_vocab_ids"
Tensors = dict[str, Tensor]


def base_of(target: Path) -> Base:
    checkpoint = open_checkpoint(target)
    return Base(
        id=str(target),
        tokenizer_sha256=load_tokenizer(target).sha256,
        vocab_size=checkpoint.hf_config["vocab_size"],
        weights_sha256=checkpoint.weights_sha256(),
    )


def write_draft(
    folder: Path,
    target: Path,
    draft: Path,
    *,
    ids: Sequence[int] | None = None,
    shared: Iterable[str] = (),
    int8: bool = False,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[Tensors], None] = lambda tensors: None,
    **manifest: Any,
) -> Path:
    """The plain checkpoint ``draft`` as a native draft of ``target``.

    Args:
        ids: of a restricted vocabulary; the head keeps their rows, or stays tied.
        shared: names left to the target.
        int8: store the linears in int8, the rest in ``dtype``.
        edit: last change to the tensors before they are written.
        manifest: fields to replace.
    """
    config = json.loads((draft / "config.json").read_text())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(draft / "model.safetensors").items()}
    if ids is not None and HEAD in tensors:
        tensors[HEAD] = tensors[HEAD][list(ids)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(shared)}
    if int8:
        tensors = int8_linears(tensors)
    if ids is not None:
        tensors[IDS] = torch.tensor(ids, dtype=torch.int32)
    edit(tensors)
    floats = "bf16" if dtype is torch.bfloat16 else "fp32"
    fields = {
        "kind": "draft",
        "base": base_of(target),
        "weights": {"format": "int8" if int8 else floats},
        "shared_with_target": tuple(shared),
        "draft_vocab": None if ids is None else IDS,
        **manifest,
    }
    write_native_draft(
        folder, config=config, tensors=tensors, manifest=Manifest(**fields), tokenizer_from=target
    )
    return folder
