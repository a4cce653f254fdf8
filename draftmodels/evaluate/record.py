"""Writing figures into an artifact's ``paceline.json``, so that a draft carries what it was measured to be."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paceline.draftmodels.evaluate.figures import Result
from paceline.draftmodels.evaluate.plan import Plan
from paceline.server.errors import ConfigError
from paceline.server.models.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from paceline.server.models.sources import resolve

#: Figures with these equal replace each other.
_SAME = ("dataset", "split", "temperature", "max_draft_tokens")


def check_recordable(plan: Plan) -> None:
    """Refuse what ``measured`` has no fields to tell from the plain case, before anything is measured.

    Raises:
        ConfigError: another setting, or a draft that has no manifest.
        UserError: the draft cannot be found, or its manifest is broken.
    """
    if plan.speculation.policy != "fixed" or plan.streams != 1 or plan.seed is not None or not plan.rounds:
        raise ConfigError(
            "--record keeps figures of --policy fixed, --streams 1, no --seed and at least one round, as paceline.json "
            "cannot tell others from them; change these options or leave --record out"
        )
    _manifest(plan)


def record(plan: Plan, setting: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Add the total of every temperature to ``measured``, in place of figures of the same setting.

    Returns:
        The file that was written.
    """
    folder, manifest = _manifest(plan)
    entries = [_entry(setting, result) for result in results]
    replaced = [_setting_of(entry) for entry in entries]
    kept = [old for old in manifest.measured if _setting_of(old) not in replaced]
    write_manifest(folder, replace(manifest, measured=(*kept, *entries)))
    return folder / MANIFEST


def _manifest(plan: Plan) -> tuple[Path, Manifest]:
    if plan.draft == "ngram":
        raise ConfigError("--record needs a draft model: n-grams have no paceline.json")
    folder = resolve(plan.draft)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise ConfigError(f"--record: {folder} has no {MANIFEST}; only drafts made by Paceline keep figures")
    return folder, manifest


def _entry(setting: Mapping[str, Any], result: Result) -> dict[str, Any]:
    total = result.total
    assert total.speed is not None
    return {
        "dataset": setting["dataset"],
        "split": setting["split"],
        "temperature": result.temperature,
        "max_draft_tokens": setting["max_draft_tokens"],
        "alpha": _rounded(total.acceptance.alpha),
        "tau": _rounded(total.acceptance.tau),
        "n_tokens": total.acceptance.n_tokens,
        "speedup": _rounded(total.speed.speedup),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _setting_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in _SAME)
