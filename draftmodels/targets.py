"""What the commands of this half take as TARGET: a model reference, or a model of a configuration file.

``FILE.toml`` is the file's only model, ``FILE.toml:NAME`` one of several. This is how a steered model is named.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.config import ModelSpec, load_config
from paceline.server.config.load import default_name
from paceline.server.decoding.mixture import BASE
from paceline.server.errors import ConfigError

if TYPE_CHECKING:
    from paceline.server.engine.steering_parts import SteeringParts
    from paceline.server.models.loader import LoadedModel

_SUFFIX = ".toml"


def is_configured(reference: str) -> bool:
    """Whether a reference is a model of a configuration file."""
    return _parts(reference) is not None


def target_spec(reference: str) -> ModelSpec:
    """The model that a reference names; all but its target is default where it is not in a file.

    Raises:
        ConfigError: a file that is wrong, or has no such model.
    """
    parts = _parts(reference)
    if parts is None:
        return ModelSpec(default_name(reference), reference)
    path, name = parts
    models = load_config(Path(path), os.environ, {}).models
    names = ", ".join(model.name for model in models)
    if not name and len(models) > 1:
        raise ConfigError(f"TARGET: {path} lists several models; name one as {path}:NAME: {names}")
    found = next((model for model in models if name in ("", model.name)), None)
    if found is None:
        raise ConfigError(f'TARGET: {path} has no model "{name}"; it lists: {names}')
    return found


def steering_note(spec: ModelSpec, target: "LoadedModel", steering: "SteeringParts") -> list[dict[str, Any]]:
    """What an artifact says about the steering that it was made for: each pair as configured, with the hashes of its
    weights."""

    def sha256(member: int | None) -> str | None:
        if member is None:
            return None
        return (target if member == BASE else steering.members[member - 1].loaded).weights_sha256

    return [
        {
            **asdict(config),
            pair.parameter: pair.strength,
            "expert_sha256": sha256(pair.expert),
            "anti_expert_sha256": sha256(pair.anti_expert),
        }
        for config, pair in zip(spec.steering, steering.pairs, strict=True)
    ]


def _parts(reference: str) -> tuple[str, str] | None:
    """(file, name or nothing)."""
    if reference.endswith(_SUFFIX):
        return reference, ""
    path, _, name = reference.rpartition(":")
    return (path, name) if path.endswith(_SUFFIX) else None
