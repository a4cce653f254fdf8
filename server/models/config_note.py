"""A parsed configuration as a note beside packed weights, so that a warm start need not import transformers' models.

That import is 1.3-2.4 s of a start (measured), for shapes that were known when the weights were packed. A note counts
only for the same ``config.json``, the same transformers and the same parsing code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paceline.server.models import config as parsing
from paceline.server.models.config import ModelConfig


def describe(hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The note, ready for JSON."""
    return {"key": _key(hf), "config": asdict(config)}


def restore(note: Any, hf: Mapping[str, Any]) -> ModelConfig | None:
    """What ``describe`` was given, if the note is about this ``config.json``, read by this code."""
    if not isinstance(note, dict) or note.get("key") != _key(hf):
        return None
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in note["config"].items()
    }
    return ModelConfig(**values)


def _key(hf: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{_code()}\n{json.dumps(hf, sort_keys=True)}".encode()).hexdigest()


@cache
def _code() -> str:
    source = hashlib.sha256(Path(parsing.__file__).read_bytes()).hexdigest()
    return f"transformers {version('transformers')}, {source}"
