"""Cutting an untrained draft out of a target: some of its decoder layers, everything else kept.

Owns which configuration fields and tensors change when layers go away. The result is a plain Hugging Face
checkpoint (bf16) with tokenizer and manifest. Untrained it proposes little that the target accepts; it is
where distillation starts.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.draftmodels.provenance import provenance
from paceline.server.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch

    from paceline.server.models.checkpoint import Checkpoint

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
#: What makes up a tokenizer on disk, beside the weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


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

    _check_output(output, force)
    path = resolve(target)
    checkpoint = open_checkpoint(path)
    # Refuses what the engine could not draft with; transformers writes into nested tables of what it is given.
    parse_model_config(copy.deepcopy(checkpoint.hf_config), where=target)
    _check_layers(layers, checkpoint.hf_config["num_hidden_layers"], target)
    tensors = cut_tensors(checkpoint, layers)
    with _complete_or_nothing(output) as folder:
        _write_checkpoint(folder, cut_config(checkpoint.hf_config, layers), tensors)
        _copy_tokenizer(path, folder)
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


def _check_layers(layers: Sequence[int], count: int, target: str) -> None:
    outside = [layer for layer in layers if not 0 <= layer < count]
    if not layers or outside or len(set(layers)) != len(layers):
        what = f"layer {outside[0]} does not exist" if outside else "layers must be named, each once"
        raise ConfigError(f"--layers: {what}; {target} has layers 0 to {count - 1}")


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ConfigError(f"{output} is not empty; name another folder or replace it with --force")


@contextmanager
def _complete_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends well."""
    parent = output.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise ConfigError(f"cannot write to {parent}: {error.strerror}") from error
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if output.exists():
            output.rename(old)
        temporary.rename(output)
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, "torch.Tensor"]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # as the other files; safetensors keeps it private
    except SafetensorError as error:  # a full disk, mostly
        raise ArtifactError(f"cannot write the draft's weights: {error}") from error


def _copy_tokenizer(target: Path, folder: Path) -> None:
    if target.is_file():
        from paceline.server.models.gguf_tokenizer import converted_folder

        target = converted_folder(target)
    for name in _TOKENIZER_FILES:
        if (target / name).exists():
            shutil.copyfile(target / name, folder / name)


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
