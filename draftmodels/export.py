"""``paceline export``: an artifact in native form, copied and checked, or turned into a plain checkpoint.

What the plain one is: ``server.models.standalone``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.draftmodels.artifact import check_native, check_output
from paceline.server.errors import ConfigError
from paceline.server.models.folders import complete_or_nothing

if TYPE_CHECKING:
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
    from paceline.server.models.standalone import write_standalone

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
            write_standalone(checkpoint, base, folder)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        size = (folder / "model.safetensors").stat().st_size
    return ExportReport(output, "standalone" if standalone else "native", checkpoint.manifest.base.id, size)


def _needs_target(checkpoint: "NativeCheckpoint", standalone: bool) -> bool:
    from paceline.server.models.standalone import reads_state

    uses_head = checkpoint.draft_vocab is not None or reads_state(checkpoint)
    return bool(checkpoint.manifest.shared_with_target) or (standalone and uses_head)


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
