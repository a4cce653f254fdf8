"""What a sparse student declares of its losses against the dense model that it was pruned from.

They stand in ``measured`` of its manifest (``paceline evaluate sparse STUDENT --record``), entries with ``kl_nats``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.server.models.manifest import Manifest

#: Keys of an entry of ``measured`` that is about losses; ``parent_*`` are the dense parent's figures.
KL, TOP1 = "kl_nats", "top1_agreement"
PERPLEXITY, PARENT_PERPLEXITY = "perplexity", "parent_perplexity"
ACCURACY, PARENT_ACCURACY, TASK = "task_accuracy", "parent_task_accuracy", "task"


def is_student(manifest: Manifest | None) -> bool:
    """Whether an artifact stands in for its base, instead of drafting for it."""
    return manifest is not None and manifest.kind == "student"


def losses(manifest: Manifest) -> Mapping[str, Any] | None:
    """The latest entry of ``measured`` that says how far the student is from its parent."""
    return next((entry for entry in reversed(manifest.measured) if KL in entry), None)


def declaration(manifest: Manifest, path: Path) -> str:
    """One line for whoever serves a student: that it is lossy, and by how much."""
    lossy = f"{path.name} is a student of {manifest.base.id}: its text is not that of its parent"
    entry = losses(manifest)
    if entry is None:
        return f"{lossy}, and by how much was not measured (paceline evaluate sparse {path} --record)"
    figures = [
        _figure("KL", entry.get(KL), ".3f", " nats"),
        _figure("perplexity", entry.get(PERPLEXITY), ".2f", _against(entry.get(PARENT_PERPLEXITY), ".2f")),
        _figure(
            f"{entry.get(TASK) or 'task'} accuracy",
            entry.get(ACCURACY),
            ".1%",
            _against(entry.get(PARENT_ACCURACY), ".1%"),
        ),
        _figure("top-1 agreement", entry.get(TOP1), ".1%"),
    ]
    measured = ", ".join(figure for figure in figures if figure)
    return f"{lossy}: {measured} on {entry.get('dataset', 'text that is not named')}"


def _figure(name: str, value: Any, form: str, unit: str = "") -> str:
    return f"{name} {value:{form}}{unit}" if _is_number(value) else ""


def _against(value: Any, form: str) -> str:
    return f" (parent {value:{form}})" if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    """Manifests are written by anyone."""
    return isinstance(value, int | float) and not isinstance(value, bool)
