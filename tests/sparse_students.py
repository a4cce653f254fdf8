"""Sparse students for tests, made of tiny plain checkpoints by magnitude; and the same weights as plain checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from native_drafts import HEAD, IDS, base_of
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor

from paceline.draftmodels.artifact import int8_linears, write_native_draft, write_student
from paceline.kernels.formats import Pattern, SparseWeight, ValueDtype
from paceline.server.models.manifest import Manifest

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def is_pruned(name: str) -> bool:
    return name.endswith("_proj.weight")


def kept_by_magnitude(weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """bool [out, in]: n of every m inputs, or the largest ``1 - sparsity`` of each row."""
    groups = weight.abs().unflatten(1, (-1, pattern.m if pattern.structured else weight.shape[1]))
    count = pattern.n if pattern.structured else max(1, round(groups.shape[-1] * (1 - sparsity)))
    kept = torch.zeros(groups.shape, dtype=torch.bool)
    kept.scatter_(-1, groups.topk(count, dim=-1).indices, True)
    return kept.flatten(1)


def prune(
    parent: Path, pattern: str = "unstructured", dtype: ValueDtype = "fp32", sparsity: float = 0.5
) -> tuple[dict[str, Tensor], dict[str, SparseWeight]]:
    """A plain checkpoint's tensors, those that stay dense and the linears of its blocks, sparse."""
    own = Pattern.parse(pattern)
    dense, sparse = {}, {}
    for name, tensor in load_file(parent / "model.safetensors").items():
        if not is_pruned(name):
            dense[name] = tensor
            continue
        kept = kept_by_magnitude(tensor, own, sparsity)
        weight, scale = tensor * kept, None
        if dtype == "int8":
            both = int8_linears({name: weight})
            weight, scale = both[name], both[f"{name}_scale"]
        else:
            weight = weight.to(FLOATS[dtype])
        sparse[name] = SparseWeight.from_dense(weight, kept, pattern=own, scale=scale)
    return dense, sparse


def write_tiny_student(
    folder: Path,
    parent: Path,
    *,
    pattern: str = "unstructured",
    dtype: ValueDtype = "fp32",
    sparsity: float = 0.5,
    int8_head: bool = False,
    ids: Sequence[int] | None = None,
    **manifest: Any,
) -> Path:
    """The plain checkpoint ``parent`` as a student of itself, its blocks pruned.

    Args:
        ids: of a restricted vocabulary; the head keeps their rows, if it is stored.
        manifest: fields to replace; tensors that are shared are not stored.
    """
    dense, sparse = prune(parent, pattern, dtype, sparsity)
    if ids is not None:
        dense |= {HEAD: dense[HEAD][list(ids)], IDS: torch.tensor(ids, dtype=torch.int32)}
        manifest["draft_vocab"] = IDS
    if int8_head:
        dense |= int8_linears({HEAD: dense[HEAD]})
    dense = {name: t for name, t in dense.items() if name not in manifest.get("shared_with_target", ())}
    write_student(
        folder,
        config=json.loads((parent / "config.json").read_text()),
        tensors=dense,
        sparse=sparse,
        manifest=Manifest(**{"kind": "student", "base": base_of(parent), "weights": {}, **manifest}),
        tokenizer_from=parent,
    )
    return folder


def write_dense_twin(
    folder: Path,
    parent: Path,
    *,
    pattern: str = "unstructured",
    dtype: ValueDtype = "fp32",
    sparsity: float = 0.5,
) -> Path:
    """The weights of ``write_tiny_student`` with their zeros: a plain checkpoint, or dense int8 in native form."""
    dense, sparse = prune(parent, pattern, dtype, sparsity)
    config = json.loads((parent / "config.json").read_text())
    if dtype != "int8":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(dense | {name: w.to_dense() for name, w in sparse.items()}, folder / "model.safetensors")
        tiny_tokenizer(config["vocab_size"]).save_pretrained(folder)
        return folder
    for name, weight in sparse.items():
        assert weight.scale is not None
        dense |= {name: weight.stored(), f"{name}_scale": weight.scale}
    manifest = Manifest(kind="student", base=base_of(parent), weights={"format": "int8"})
    write_native_draft(folder, config=config, tensors=dense, manifest=manifest, tokenizer_from=parent)
    return folder
