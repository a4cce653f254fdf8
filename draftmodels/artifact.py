"""Writing model folders: complete or not at all, with their tokenizer; drafts and sparse students in native form.

The counterpart of ``server.models.native_form``, which reads them. Knows nothing of training.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.folders import complete_or_nothing, copy_tokenizer, write_checkpoint

if TYPE_CHECKING:
    import torch

    from paceline.kernels.formats import SparseWeight
    from paceline.server.models.manifest import Manifest
    from paceline.server.models.native_form import NativeCheckpoint


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
