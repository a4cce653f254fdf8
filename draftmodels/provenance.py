"""Where an artifact came from: code version, library versions, command line, seed and date.

Machine-independent: no host names and no absolute paths of ours.
"""

import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = ("paceline", "torch", "transformers", "tokenizers", "safetensors")


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """The ``provenance`` of a manifest, for the running command."""
    return {
        "git": _commit(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name)) is not None},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this code runs from, None for an installed package."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
