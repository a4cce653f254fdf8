"""``metrics.jsonl``: one JSON object per optimiser step, and one per measurement."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines; ``enabled`` False does nothing (ranks other than the main one)."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path, self._enabled = path, enabled

    def rewind(self, step: int) -> None:
        """Drop lines of later steps, which a resumed job does again, and one that was cut short by a kill."""
        if self._enabled and self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] <= step]
            self._path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """One line, written at once: what is lost in a kill is at most the last one."""
        if self._enabled:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    result = []
    for line in lines:
        try:
            result.append(json.loads(line))
        except ValueError:  # cut short by a kill
            break
    return result
