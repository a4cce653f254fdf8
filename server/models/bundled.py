"""Drafts that come with Paceline, found by the target that they were made for.

They are folders in native form below ``draftmodels/pretrained``. That package is looked up as a resource and never run:
an installation without it has no such drafts.
"""

from functools import cache
from importlib import resources
from pathlib import Path

from paceline.server.models.manifest import MANIFEST, read_manifest

_PACKAGE = "paceline.draftmodels.pretrained"


@cache
def bundled() -> dict[str, Path]:
    """Folders by name."""
    try:
        folder = Path(str(resources.files(_PACKAGE)))
    except ModuleNotFoundError:
        return {}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}


def bundled_draft(weights_sha256: str) -> str | None:
    """Name of the draft that was made for the weights with this hash, if there is one.

    Raises:
        ArtifactError: a bundled manifest is damaged.
    """
    for name, folder in bundled().items():
        manifest = read_manifest(folder)
        if manifest is not None and manifest.base.weights_sha256 == weights_sha256:
            return name
    return None
