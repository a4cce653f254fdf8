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
from paceline.server.models.config import FC, FINAL_NORM, FIRST_NORM, parse_model_config
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
    return _write(folder, target, config, tensors, ids, tuple(shared), int8, dtype, edit, manifest)


def write_feature_draft(
    folder: Path,
    target: Path,
    *,
    seed: int = 0,
    layers: int = 1,
    ids: Sequence[int] | None = None,
    shared: Iterable[str] = (EMBEDDING, HEAD),
    int8: bool = False,
    dtype: torch.dtype = torch.float32,
    **manifest: Any,
) -> Path:
    """A random draft of ``target`` that reads its states; see ``write_draft``. It is hardly ever right."""
    config = feature_config(target, layers)
    shapes = parse_model_config(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in shapes.tensor_names():
        shape = shapes.tensor_shape(name)
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.2 * noise if "norm" in name else noise / shape[-1] ** 0.5).to(dtype)
    return _write(folder, target, config, tensors, ids, tuple(shared), int8, dtype, lambda t: None, manifest)


def write_near_feature_draft(
    folder: Path, target: Path, *, ids: Sequence[int] | None = None, state_weight: float = 0.1
) -> Path:
    """A draft that reads states, made of all of a Llama target's blocks: it agrees with the target often.

    What the target has and such a draft lacks, the first and the last norm, is folded into the linears behind them
    for rows of a typical size. States, mixed by a random matrix, weigh ``state_weight`` times as much as embeddings.
    """
    config = json.loads((target / "config.json").read_text())
    config = feature_config(target, config["num_hidden_layers"])
    tensors = load_file(target / "model.safetensors")
    first, last = tensors.pop(FIRST_NORM), tensors.pop(FINAL_NORM)
    rms = float(tensors[EMBEDDING].square().mean().sqrt())
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        tensors[name] = tensors[name] * first / rms
    tensors[HEAD] = tensors[HEAD] * last / 2
    hidden = config["hidden_size"]
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(1)) / hidden**0.5
    tensors[FC] = torch.cat((torch.eye(hidden), state_weight * rms * noise), dim=1)
    shared = (EMBEDDING,)
    return _write(folder, target, config, tensors, ids, shared, False, torch.float32, lambda t: None, {})


def feature_config(target: Path, layers: int) -> dict[str, Any]:
    """``config.json`` of a draft that reads the target's states."""
    return open_checkpoint(target).hf_config | {
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "reads_target_state": True,
    }


def _write(
    folder: Path,
    target: Path,
    config: dict[str, Any],
    tensors: Tensors,
    ids: Sequence[int] | None,
    shared: tuple[str, ...],
    int8: bool,
    dtype: torch.dtype,
    edit: Callable[[Tensors], None],
    manifest: dict[str, Any],
) -> Path:
    if ids is not None and HEAD in tensors:
        tensors[HEAD] = tensors[HEAD][list(ids)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
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
        "shared_with_target": shared,
        "draft_vocab": None if ids is None else IDS,
        **manifest,
    }
    write_native_draft(
        folder, config=config, tensors=tensors, manifest=Manifest(**fields), tokenizer_from=target
    )
    return folder
