"""What is to be measured of a student: the command's options, checked before anything is loaded."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paceline.server.config import PacelineConfig, load_config, resolve
from paceline.server.errors import ConfigError, ModelNotFoundError
from paceline.server.models.manifest import Manifest, read_manifest
from paceline.server.models.sources import resolve as find

_log = logging.getLogger(__name__)
PARENT, STUDENT = "parent", "student"


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked measurement of one student.

    Attributes:
        config: resolved; the models ``PARENT`` and ``STUDENT`` in one engine without prefix caching, both with the
            draft, if there is one.
        prompts: what is answered for speed: path, or ``built-in``.
        text: what losses are measured on: path, or ``built-in``.
        text_tokens: at most so many tokens of it.
        rounds: timed rounds; 0 measures losses only.
    """

    config: PacelineConfig
    manifest: Manifest | None
    prompts: str
    limit: int
    max_tokens: int
    text: str
    text_tokens: int
    rounds: int

    @property
    def parent(self) -> str:
        """Reference of the dense model."""
        return self.config.models[0].target

    @property
    def student(self) -> str:
        """Reference of the sparse one."""
        return self.config.models[1].target

    @property
    def draft(self) -> str | None:
        """Reference of the draft that both are also timed with."""
        return self.config.models[0].speculation.draft


def find_student(student: str) -> tuple[Path, Manifest | None]:
    """Where the student is, and its manifest.

    Raises:
        UserError: it cannot be found, or its manifest is broken.
    """
    path = find(student)
    return path, read_manifest(path) if path.is_dir() else None


def find_parent(manifest: Manifest | None, parent: str | None) -> str:
    """Reference of the dense model: the one that is named, or what the student's manifest says.

    Raises:
        ConfigError: neither says it.
        ModelNotFoundError: the model is not there.
    """
    if parent is None and manifest is None:
        raise ConfigError("the student has no paceline.json that names its parent; name it with --parent")
    reference = parent or (manifest.base.id if manifest is not None else "")
    try:
        find(reference)
    except ModelNotFoundError as error:
        if parent is not None:
            raise
        raise ModelNotFoundError(
            f"the student's parent {reference} is not found; name it with --parent"
        ) from error
    return reference


def make_config(student: str, parent: str, flags: Mapping[str, str | None]) -> PacelineConfig:
    """The server's own configuration for these flags, environment variables included, with both models.

    Raises:
        ConfigError: a bad value.
    """
    config = load_config(None, os.environ, {**flags, "model": parent})
    (dense,) = config.models
    models = (replace(dense, name=PARENT), replace(dense, name=STUDENT, target=student))
    return resolve(replace(config, models=models, engine=replace(config.engine, prefix_caching=False)))


def warn_of_other_weights(manifest: Manifest | None, sha256: str, parent: str) -> None:
    """A parent in another container has another hash, so that this is no error."""
    if manifest is not None and manifest.base.weights_sha256 != sha256:
        _log.warning(
            "%s is not the file that the student was made of (%s): its figures may be another model's",
            parent,
            manifest.base.id,
        )
