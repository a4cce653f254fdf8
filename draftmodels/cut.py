"""Cutting an untrained draft out of a target: some of its decoder layers, everything else kept.

Owns which configuration fields and tensors change when layers go away. The result is a plain Hugging Face
checkpoint (bf16) with tokenizer and manifest. Untrained it proposes little that the target accepts; it is
where distillation starts.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.draftmodels.artifact import check_output
from paceline.draftmodels.provenance import provenance
from paceline.server.errors import ConfigError
from paceline.server.models.folders import complete_or_nothing, copy_tokenizer, write_checkpoint

if TYPE_CHECKING:
    import torch

    from paceline.server.models.checkpoint import Checkpoint

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class CutReport:
    """What was written."""

    path: Path
    base: str
    layers: tuple[int, ...]
    parameters: int
    weights_bytes: int


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of a list such as ``0,1,28,29``.

    Raises:
        ConfigError: empty, not numbers, negative or repeated.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError("--layers is empty: name the target's layers to keep, for example 0,1,28,29")
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise ConfigError(f"--layers holds {wrong[0]!r}, which is not a layer number")
    layers = tuple(int(part) for part in parts)
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ConfigError(f"--layers names layer {repeated[0]} twice")
    return layers


def cut_draft(target: str, layers: Sequence[int], output: Path, *, force: bool = False) -> CutReport:
    """Write a draft made of ``layers`` of ``target`` (kept in the order given) to the folder ``output``.

    The folder appears complete or not at all.

    Args:
        target: a model reference.
        layers: numbers of the target's decoder layers, counted from 0.
        output: a new or empty folder; with ``force`` also one to replace.

    Raises:
        ConfigError: a layer that the target does not have, or a folder that is in use.
        UserError: the target cannot be found or opened.
    """
    from paceline.server.models.checkpoint import open_checkpoint
    from paceline.server.models.config import parse_model_config
    from paceline.server.models.sources import resolve

    check_output(output, force)
    path = resolve(target)
    checkpoint = open_checkpoint(path)
    # Refuses what the engine could not draft with; transformers writes into nested tables of what it is given.
    parse_model_config(copy.deepcopy(checkpoint.hf_config), where=target)
    check_layers(layers, checkpoint.hf_config["num_hidden_layers"], target)
    tensors = cut_tensors(checkpoint, layers)
    with complete_or_nothing(output) as folder:
        write_checkpoint(folder, cut_config(checkpoint.hf_config, layers), tensors)
        copy_tokenizer(path, folder)
        _write_manifest(folder, target, path, checkpoint, layers)
    weights_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return CutReport(output, target, tuple(layers), sum(t.numel() for t in tensors.values()), weights_bytes)


def cut_config(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The target's ``config.json`` for the layers that stay."""
    cut = dict(config)
    count = config["num_hidden_layers"]
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        # Which layers slide hangs on their number in the target: spell it out before the numbers change.
        first = config.get("max_window_layers", count)
        cut["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    if cut.get("layer_types") is not None:
        cut["layer_types"] = [cut["layer_types"][layer] for layer in layers]
    if "max_window_layers" in config:
        cut["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in layers)
    cut["num_hidden_layers"] = len(layers)
    cut.pop("dtype", None)
    cut["torch_dtype"] = "bfloat16"
    return cut


def cut_tensors(checkpoint: "Checkpoint", layers: Sequence[int]) -> dict[str, "torch.Tensor"]:
    """The draft's tensors, bf16 and contiguous: the kept layers renumbered, and all outside the layers."""
    import torch

    position = {layer: new for new, layer in enumerate(layers)}
    tied = bool(checkpoint.hf_config.get("tie_word_embeddings"))
    tensors = {}
    for name in checkpoint.tensor_names():
        match = _LAYER_TENSOR.fullmatch(name)
        if (match and int(match[1]) not in position) or (tied and name == "lm_head.weight"):
            continue
        new_name = f"model.layers.{position[int(match[1])]}.{match[2]}" if match else name
        tensors[new_name] = checkpoint.tensor(name).to(torch.bfloat16).contiguous()
    return tensors


def check_layers(layers: Sequence[int], count: int, target: str) -> None:
    """Refuse layers that a target of ``count`` layers does not have, none at all, or one named twice.

    Raises:
        ConfigError: names the layer.
    """
    outside = [layer for layer in layers if not 0 <= layer < count]
    if not layers or outside or len(set(layers)) != len(layers):
        what = f"layer {outside[0]} does not exist" if outside else "layers must be named, each once"
        raise ConfigError(f"--layers: {what}; {target} has layers 0 to {count - 1}")


def _write_manifest(
    folder: Path, target: str, path: Path, checkpoint: "Checkpoint", layers: Sequence[int]
) -> None:
    from paceline.server.models.manifest import Base, Manifest, write_manifest
    from paceline.server.models.tokenizer import load_tokenizer

    base = Base(
        id=target,
        tokenizer_sha256=load_tokenizer(path).sha256,
        vocab_size=checkpoint.hf_config["vocab_size"],
        weights_sha256=checkpoint.weights_sha256(),
    )
    recipe = {"init": {"method": "cut", "layers": list(layers)}}
    manifest = Manifest("draft", base, {"format": "bf16"}, recipe=recipe, provenance=provenance())
    write_manifest(folder, manifest)
