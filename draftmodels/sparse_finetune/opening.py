"""Opening what a recovery job starts from, and refusing what does not belong together: student, teacher."""

from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from paceline.kernels.formats import Pattern
from paceline.server.errors import ArtifactError, ConfigError, ModelNotFoundError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.native_form import NativeCheckpoint, is_native_form, open_model
from paceline.server.models.sources import resolve
from paceline.server.models.tokenizer import load_tokenizer

#: What may differ between a student and its teacher: how long a context they were made for.
_MAY_DIFFER = frozenset({"context_length"})


@dataclass(frozen=True)
class OpenedStudent:
    """A sparse artifact.

    Attributes:
        kept: bool [out, in] of every sparse linear, by its Hugging Face name.
    """

    checkpoint: NativeCheckpoint
    config: ModelConfig
    pattern: Pattern
    kept: dict[str, Tensor]


def open_student(reference: str) -> OpenedStudent:
    """The student to recover.

    Raises:
        ConfigError: not a sparse student.
        UserError: it cannot be found or is broken.
    """
    path = resolve(reference)
    checkpoint = NativeCheckpoint(path) if path.is_dir() and is_native_form(path) else None
    if checkpoint is None or checkpoint.sparse_form is None:
        raise ConfigError(
            f"STUDENT: {reference} has no sparse weights; make a student with paceline sparsify"
        )
    if checkpoint.manifest.shared_with_target or checkpoint.draft_vocab is not None:
        raise ConfigError(
            f"STUDENT: {reference} is a draft that takes tensors or ids from its target; it cannot be trained alone"
        )
    config = parse_model_config(checkpoint.hf_config, where=str(path))
    if config.reads_state:
        raise ConfigError(f"STUDENT: {reference} reads its target's states; paceline train-draft trains it")
    found = {name: checkpoint.sparse(name) for name in config.tensor_names()}
    kept = {name: weight.kept() for name, weight in found.items() if weight is not None}
    return OpenedStudent(checkpoint, config, checkpoint.sparse_form.pattern, kept)


def open_teacher(student: OpenedStudent, reference: str | None) -> tuple[Checkpoint, ModelConfig]:
    """The dense model that teaches.

    Args:
        reference: None is the model that the student's manifest names as its base; its weights must be those.

    Raises:
        ConfigError: it does not fit the student.
        UserError: it cannot be found or is broken.
    """
    base = student.checkpoint.manifest.base
    name = reference or base.id
    try:
        path = resolve(name)
    except ModelNotFoundError as error:
        if reference is not None:
            raise
        raise ModelNotFoundError(
            f"the student's dense parent {base.id} is not found; name it with --teacher"
        ) from error
    teacher = open_model(path)
    if reference is None and teacher.weights_sha256() != base.weights_sha256:
        raise ArtifactError(
            f"the student was made from {base.id} with weights of SHA-256 {base.weights_sha256}, but {path} has "
            f"{teacher.weights_sha256()}; name the right one with --teacher"
        )
    config = parse_model_config(teacher.hf_config, where=str(path))
    _check_same_shape(student.config, config, name)
    _check_tokenizers(student.checkpoint.path, path, name)
    return teacher, config


def _check_same_shape(ours: ModelConfig, theirs: ModelConfig, name: str) -> None:
    for entry in fields(ModelConfig):
        a, b = getattr(theirs, entry.name), getattr(ours, entry.name)
        if entry.name not in _MAY_DIFFER and a != b:
            raise ConfigError(
                f"--teacher: {name} has another architecture than the student: {entry.name} is {a}, not {b}"
            )


def _check_tokenizers(ours: Path, theirs: Path, name: str) -> None:
    a, b = load_tokenizer(theirs).sha256, load_tokenizer(ours).sha256
    if a != b:
        raise ConfigError(
            f"--teacher: the tokenizer of {name} (SHA-256 {a}) is not the student's ({b}); a teacher must read the "
            "same ids"
        )
