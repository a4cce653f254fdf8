"""Models as plain checkpoints (safetensors, bf16, full vocabulary), which transformers and vLLM load.

Owns which tensors and fields a plain checkpoint has that an artifact in native form lacks, and the cached plain folders
of models that other engines cannot open: GGUF files and artifacts. Of a draft that reads its target's states only vLLM
loads the plain form (``eagle_form``).
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError
from paceline.server.models.folders import complete_or_nothing, copy_tokenizer, write_checkpoint
from paceline.server.models.sources import cache_dir

if TYPE_CHECKING:
    import torch

    from paceline.server.models.checkpoint import Checkpoint
    from paceline.server.models.native_form import NativeCheckpoint

_log = logging.getLogger(__name__)
#: Part of the cache key: raise it when the conversion changes.
_CONVERTER = 2


def plain_folder(path: Path, cache: Path | None = None) -> Path:
    """A Hugging Face folder of the same model: ``path`` itself, or a ``.gguf`` file converted once to bf16.

    Raises:
        ArtifactError: it cannot be read, or its folder cannot be written.
    """
    from paceline.server.models.checkpoint import open_checkpoint

    if path.is_dir():
        return path
    checkpoint = open_checkpoint(path)
    folder = _cached(path.stem, checkpoint.weights_sha256(), cache)
    if not folder.is_dir():
        _log.info("converting %s to bf16 (once)", path.name)
        with complete_or_nothing(folder) as temporary:
            write_checkpoint(temporary, _bf16_config(checkpoint.hf_config), _bf16_tensors(checkpoint))
            copy_tokenizer(path, temporary)
    return folder


def plain_draft(path: Path, target: Path, cache: Path | None = None) -> Path:
    """A draft's Hugging Face folder: ``path`` itself, or an artifact in native form converted once.

    Args:
        target: folder or file of the model that it drafts for.

    Raises:
        ArtifactError: it is broken, was made for another target, or has no plain form.
    """
    from paceline.server.models.native_form import NativeCheckpoint, is_native_form, open_model

    if not is_native_form(path):
        return plain_folder(path, cache)
    base = open_model(target)
    checkpoint = NativeCheckpoint(path, base)
    folder = _cached(path.name, checkpoint.weights_sha256() + base.weights_sha256(), cache)
    if not folder.is_dir():
        _log.info("converting the draft %s to bf16 (once)", path.name)
        with complete_or_nothing(folder) as temporary:
            write_standalone(checkpoint, base, temporary)
    return folder


def reads_state(checkpoint: "NativeCheckpoint") -> bool:
    """Whether it is a draft that reads its target's states."""
    from paceline.server.models.config import READS_STATE

    return bool(checkpoint.hf_config.get(READS_STATE))


def _cached(name: str, key: str, cache: Path | None) -> Path:
    """Where a plain folder belongs; the name is for whoever looks into the cache."""
    short = hashlib.sha256(f"{key}/{_CONVERTER}".encode()).hexdigest()[:16]
    return cache_dir(cache) / "plain" / f"{name}-{short}"


def _bf16_config(config: "dict[str, Any]") -> dict[str, Any]:
    return {**{k: v for k, v in config.items() if k != "dtype"}, "torch_dtype": "bfloat16"}


def _bf16_tensors(checkpoint: "Checkpoint") -> dict[str, "torch.Tensor"]:
    import torch

    return {name: checkpoint.tensor(name).to(torch.bfloat16) for name in checkpoint.tensor_names()}


def standalone_tensors(
    checkpoint: "NativeCheckpoint", target: "Checkpoint | None"
) -> dict[str, "torch.Tensor"]:
    """Every tensor of the plain checkpoint, bf16; the head has a row for every id.

    Args:
        checkpoint: opened with its target if it shares tensors.
        target: gives the head's rows for ids that the draft does not propose; needed for a restricted vocabulary.
    """
    import torch

    tensors = _bf16_tensors(checkpoint)
    if checkpoint.draft_vocab is not None:
        assert target is not None
        from paceline.server.models.config import HEAD

        head = _target_head(checkpoint, target).to(torch.bfloat16, copy=True)
        head[checkpoint.draft_vocab.long()] = tensors[HEAD]
        tensors[HEAD] = head
    return tensors


def standalone_config(checkpoint: "NativeCheckpoint") -> dict[str, Any]:
    """``config.json`` of the plain checkpoint."""
    config = _bf16_config(checkpoint.hf_config)
    if checkpoint.draft_vocab is not None:  # its head is a matrix of its own now
        config["tie_word_embeddings"] = False
    return config


def write_standalone(checkpoint: "NativeCheckpoint", target: "Checkpoint | None", folder: Path) -> None:
    """Fill ``folder`` with the plain checkpoint: configuration, weights, tokenizer and manifest.

    Args:
        target: as for ``standalone_tensors``; a draft that reads states needs it, too.

    Raises:
        ArtifactError: the artifact has no plain form (``eagle_form``), or its target's head does not fit.
    """
    from paceline.server.models.manifest import write_manifest

    if reads_state(checkpoint):
        from paceline.server.models.eagle_form import eagle_config, eagle_tensors

        assert target is not None
        config, tensors = eagle_config(checkpoint), eagle_tensors(checkpoint, target)
    else:
        config, tensors = standalone_config(checkpoint), standalone_tensors(checkpoint, target)
    write_checkpoint(folder, config, tensors)
    copy_tokenizer(checkpoint.path, folder)
    # Figures were measured with the native form; with all ids and other rounding they would be others.
    plain = replace(
        checkpoint.manifest, weights={"format": "bf16"}, shared_with_target=(), draft_vocab=None, measured=()
    )
    write_manifest(folder, plain)


def _target_head(checkpoint: "NativeCheckpoint", target: "Checkpoint") -> "torch.Tensor":
    from paceline.server.models.native_form import head_name

    head = target.tensor(head_name(target))
    expected = (checkpoint.hf_config["vocab_size"], checkpoint.hf_config["hidden_size"])
    if tuple(head.shape) != expected:
        raise ArtifactError(
            f"{checkpoint.path} cannot be exported standalone: head rows outside its vocabulary come from the target, "
            f"whose head is {list(head.shape)}, but must be {list(expected)}"
        )
    return head
