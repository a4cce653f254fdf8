"""Writing model folders: complete or not at all, with their tokenizer; drafts and sparse students in native form.

The counterpart of ``server.models.native_form``, which reads them. Knows nothing of training.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch

    from paceline.kernels.formats import SparseWeight
    from paceline.server.models.manifest import Manifest
    from paceline.server.models.native_form import NativeCheckpoint

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


def write_native_draft(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    manifest: "Manifest",
    tokenizer_from: Path,
    force: bool = False,
) -> None:
    """Write a draft in native form and check what was written; the folder appears complete or not at all.

    Args:
        folder: new or empty; with ``force`` also one to replace.
        config: the usual Hugging Face fields; ``architectures`` names the real architecture, ``vocab_size`` the ids
            that the embedding knows.
        tensors: by Hugging Face name, fp32 or bf16; ``X.weight`` int8 with ``X.weight_scale`` (``int8_linears``);
            the int32 list of ids, ascending, that ``manifest.draft_vocab`` names. Without those that
            ``manifest.shared_with_target`` names.
        manifest: ``weights.format`` is "int8" if any tensor is int8.
        tokenizer_from: folder or ``.gguf`` file of the target.

    Raises:
        ArtifactError: tensors, configuration and manifest contradict each other, or nothing can be written.
        ConfigError: a folder that is in use.
    """
    check_output(folder, force)
    _write_native(folder, native_config(config), tensors, manifest, tokenizer_from)


def write_student(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    sparse: Mapping[str, "SparseWeight"],
    manifest: "Manifest",
    tokenizer_from: Path,
    force: bool = False,
) -> None:
    """Write a sparse model in native form and check what was written; the folder appears complete or not at all.

    Args:
        folder: new or empty; with ``force`` also one to replace.
        config: the usual Hugging Face fields; ``architectures`` names the real architecture.
        tensors: all that is not sparse, as for ``write_native_draft``: fp32 or bf16 embeddings, norms, biases and head;
            where the sparse values are int8, matrices may be int8 too (``X.weight`` with ``X.weight_scale``).
        sparse: linears of the blocks by their Hugging Face name (``X.weight``), all of one pattern and one type of
            values; at least one.
        manifest: of kind "student", or "draft" or "expert". Its ``weights`` are set to what ``sparse`` is.
        tokenizer_from: folder or ``.gguf`` file of the parent.

    Raises:
        ArtifactError: tensors, configuration and manifest contradict each other, or nothing can be written.
        ConfigError: a folder that is in use.
    """
    from paceline.server.models.sparse_form import QUANTIZATION, SparseForm, parts_of

    check_output(folder, force)
    form = SparseForm.common(sparse)
    parts = [parts_of(name, weight) for name, weight in sparse.items()]
    twice = sorted(set(tensors) & (set(sparse) | {name for own in parts for name in own}))
    if twice:
        raise ArtifactError(f"{twice[0]} is among the dense tensors and among the sparse ones")
    every = {**tensors, **{name: tensor for own in parts for name, tensor in own.items()}}
    own_config = native_config(config) | {QUANTIZATION: form.quantization_config}
    _write_native(folder, own_config, every, replace(manifest, weights=form.fields), tokenizer_from)


def _write_native(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    manifest: "Manifest",
    tokenizer_from: Path,
) -> None:
    from paceline.server.models.manifest import write_manifest
    from paceline.server.models.native_form import NativeCheckpoint

    with complete_or_nothing(folder) as temporary:
        write_checkpoint(temporary, config, tensors)
        copy_tokenizer(tokenizer_from, temporary)
        write_manifest(temporary, manifest)
        try:
            check_native(NativeCheckpoint(temporary), where=folder)
        except ArtifactError as error:  # it names the folder that it read, which nobody asked for
            raise ArtifactError(str(error).replace(str(temporary), str(folder))) from error


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the native form for one that names its real architecture.

    Raises:
        ArtifactError: it names none.
    """
    from paceline.server.models.config import NATIVE_ARCHITECTURE
    from paceline.server.models.native_checks import BASE_ARCHITECTURE

    named = config.get("architectures") or []
    if not named:
        raise ArtifactError("the draft's configuration lacks architectures, for example ['LlamaForCausalLM']")
    return {**config, "architectures": [NATIVE_ARCHITECTURE], BASE_ARCHITECTURE: named[0]}


def int8_linears(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The tensors with every linear layer (projections, fc and head) in the artifact's int8; all else as it was.

    Rounds as the server does when it loads floats as int8, so that nothing is lost beyond that.
    """
    from paceline.kernels.cpu.int8 import quantize_rows
    from paceline.server.models.config import FC, HEAD
    from paceline.server.models.sparse_form import SCALE

    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name in (FC, HEAD):
            result[name], result[name + SCALE] = quantize_rows(tensor)
        else:
            result[name] = tensor
    return result


def check_native(checkpoint: "NativeCheckpoint", *, where: Path) -> None:
    """Read every tensor of an artifact that is there, and see that none is missing or left over.

    Args:
        checkpoint: opened with its target, or without; then what it shares is taken on trust.
        where: what to call it in error messages.

    Raises:
        ArtifactError: one line saying which tensor is wrong.
    """
    from paceline.server.models.config import EMBEDDING, HEAD, parse_model_config, restricted
    from paceline.server.models.tensors import CheckedTensors

    config = restricted(parse_model_config(checkpoint.hf_config, where=str(where)), checkpoint.draft_vocab)
    expected, found = set(config.tensor_names()), set(checkpoint.tensor_names())
    for name in sorted(expected ^ found):
        raise ArtifactError(
            f"{where}: tensor {name} is {'missing' if name in expected else 'not of this model'}"
        )
    unread = set() if checkpoint.has_target else set(checkpoint.manifest.shared_with_target)
    if EMBEDDING in unread and checkpoint.hf_config.get("tie_word_embeddings"):
        unread.add(HEAD)
    fetch = CheckedTensors(checkpoint, config)
    for name in sorted(expected - unread):
        fetch(name)


def check_output(output: Path, force: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: a file, or a folder with something in it that is not to be replaced.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ConfigError(f"{output} is not empty; name another folder or replace it with --force")


@contextmanager
def complete_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends well.

    Raises:
        ConfigError: nothing can be written there.
        ArtifactError: writing failed half-way; what was there still is.
    """
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


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write ``config.json`` and ``model.safetensors``; tensors may live anywhere and share memory.

    Raises:
        ArtifactError: the weights cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # as the other files; safetensors keeps it private
    except SafetensorError as error:  # a full disk, mostly
        raise ArtifactError(f"cannot write the weights: {error}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a Hugging Face folder, or of a ``.gguf`` file in its converted form."""
    if source.is_file():
        from paceline.server.models.gguf_tokenizer import converted_folder

        source = converted_folder(source)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
