"""``paceline export``: an artifact in native form, copied and checked, or turned into a plain checkpoint.

Owns which tensors and fields a plain checkpoint has that the artifact lacks. The plain one (bf16, full vocabulary,
architecture of its own) is what transformers and vLLM load; of a draft that reads states only vLLM (``export_eagle``).
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.draftmodels.artifact import (
    check_native,
    check_output,
    complete_or_nothing,
    copy_tokenizer,
    write_checkpoint,
)
from paceline.server.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch

    from paceline.server.models.checkpoint import Checkpoint
    from paceline.server.models.native_form import NativeCheckpoint


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: ``form`` is "native" or "standalone"."""

    path: Path
    form: str
    base: str
    weights_bytes: int


def export_artifact(
    source: Path, output: Path, *, standalone: bool = False, target: str | None = None, force: bool = False
) -> ExportReport:
    """Write the artifact in ``source`` to the folder ``output``, which appears complete or not at all.

    Args:
        source: folder of an artifact in native form.
        output: a new or empty folder; with ``force`` also one to replace.
        standalone: as a plain bf16 checkpoint; else as it is.
        target: reference of the model it was made for; None is what its manifest names.

    Raises:
        ConfigError: ``source`` is no artifact in native form, or ``output`` is in use.
        ArtifactError: the artifact is broken or does not fit the target.
        UserError: the target cannot be found or opened.
    """
    from paceline.server.models.native_form import NativeCheckpoint, is_native_form

    check_output(output, force)
    if not is_native_form(source):
        raise ConfigError(f"{source} is not an artifact in native form; a plain checkpoint needs no export")
    if output.resolve() == source.resolve():
        raise ConfigError(f"{output} is the artifact itself; name another folder")
    checkpoint = NativeCheckpoint(source)
    base = _open_target(checkpoint, target) if _needs_target(checkpoint, standalone) else None
    if base is not None:
        checkpoint = NativeCheckpoint(source, base)
    check_native(checkpoint, where=source)
    with complete_or_nothing(output) as folder:
        if standalone:
            _write_standalone(checkpoint, base, folder)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        size = (folder / "model.safetensors").stat().st_size
    return ExportReport(output, "standalone" if standalone else "native", checkpoint.manifest.base.id, size)


def standalone_tensors(
    checkpoint: "NativeCheckpoint", target: "Checkpoint | None"
) -> dict[str, "torch.Tensor"]:
    """Every tensor of the plain checkpoint, bf16; the head has a row for every id.

    Args:
        checkpoint: opened with its target if it shares tensors.
        target: gives the head's rows for ids that the draft does not propose; needed for a restricted vocabulary.
    """
    import torch

    tensors = {name: checkpoint.tensor(name).to(torch.bfloat16) for name in checkpoint.tensor_names()}
    if checkpoint.draft_vocab is not None:
        assert target is not None
        from paceline.server.models.config import HEAD

        head = _target_head(checkpoint, target).to(torch.bfloat16, copy=True)
        head[checkpoint.draft_vocab.long()] = tensors[HEAD]
        tensors[HEAD] = head
    return tensors


def standalone_config(checkpoint: "NativeCheckpoint") -> dict[str, Any]:
    """``config.json`` of the plain checkpoint."""
    config = {**checkpoint.hf_config, "torch_dtype": "bfloat16"}
    config.pop("dtype", None)
    if checkpoint.draft_vocab is not None:  # its head is a matrix of its own now
        config["tie_word_embeddings"] = False
    return config


def _needs_target(checkpoint: "NativeCheckpoint", standalone: bool) -> bool:
    uses_head = checkpoint.draft_vocab is not None or _reads_state(checkpoint)
    return bool(checkpoint.manifest.shared_with_target) or (standalone and uses_head)


def _reads_state(checkpoint: "NativeCheckpoint") -> bool:
    from paceline.server.models.config import READS_STATE

    return bool(checkpoint.hf_config.get(READS_STATE))


def _open_target(checkpoint: "NativeCheckpoint", target: str | None) -> "Checkpoint":
    from paceline.server.errors import ModelNotFoundError
    from paceline.server.models.manifest import check_base_weights
    from paceline.server.models.native_form import open_model
    from paceline.server.models.sources import resolve

    base = checkpoint.manifest.base
    try:
        opened = open_model(resolve(target or base.id))
    except ModelNotFoundError as error:
        if target is not None:
            raise
        raise ModelNotFoundError(
            f"the artifact's target {base.id} is not found; name it with --target"
        ) from error
    check_base_weights(base, opened.weights_sha256(), artifact=checkpoint.path, target=opened.path)
    return opened


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


def _write_standalone(checkpoint: "NativeCheckpoint", target: "Checkpoint | None", folder: Path) -> None:
    from paceline.server.models.manifest import write_manifest

    if _reads_state(checkpoint):
        from paceline.draftmodels.export_eagle import eagle_config, eagle_tensors

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
