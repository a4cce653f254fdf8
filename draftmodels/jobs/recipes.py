"""Recipes of training jobs: a dataclass of keys, filled from a TOML file (``--recipe``) and flags; the flag wins.

A key that is added to a recipe's dataclass is a key of the file and a flag at once (``server.config`` reads, checks and
explains them). What contradicts what is the business of the kind of recipe. Also keeps what a run was started with.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, TypeVar

from paceline.server.config.schema import Key, keys_of
from paceline.server.config.values import convert, nearest
from paceline.server.errors import ConfigError

R = TypeVar("R")
#: Where each value came from, by key: a flag, or FILE:KEY.
Places = Mapping[str, str]
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class RecipeKind(Generic[R]):
    """One kind of recipe.

    Attributes:
        table: the dataclass, all of whose fields are made with ``key_field``.
        packaged: folder of the recipes that come along, if any do.
        check: raises ConfigError for keys that contradict each other or would have no effect.
        changeable: keys that a resumed job may have otherwise than before.
    """

    table: type[R]
    packaged: Traversable | None
    check: Callable[[R, Places], None]
    changeable: tuple[str, ...]

    def keys(self) -> tuple[Key, ...]:
        """Every key of a recipe."""
        return tuple(keys_of("recipe", self.table).values())

    def names(self) -> list[str]:
        """Names that ``--recipe`` knows beside files."""
        found = [entry.name for entry in self.packaged.iterdir()] if self.packaged is not None else []
        return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))

    def load(self, path: str | None, flags: Mapping[str, object]) -> R:
        """The recipe from a file, or a packaged one by its name, and flags.

        Raises:
            ConfigError: unknown key, wrong value, or keys that contradict each other.
        """
        values, places = {}, {}
        known = {key.name.rstrip("_"): key for key in self.keys()}
        for name, value in (self._read(path) if path is not None else {}).items():
            place = f"{path}:{name}"
            if name not in known:
                raise ConfigError(f"{place}: unknown key; {nearest(name, known)}")
            key = known[name]
            values[key.name] = convert(key, value, place, text=False)
            places[key.name] = place
        for key in self.keys():
            if (given := flags.get(key.param)) is not None:
                values[key.name] = convert(key, given, key.flag, text=True)
                places[key.name] = key.flag
        recipe = self.table(**values)
        self.check(recipe, places)
        return recipe

    def resumed(self, saved: Mapping[str, Any], flags: Mapping[str, object], where: str) -> R:
        """The recipe that a run was started with; flags may change only what does not change its course.

        Raises:
            ConfigError: a flag that asks for another job, or a recipe of another version.
        """
        try:
            before = self.table(**saved)
        except TypeError as error:
            raise ConfigError(f"{where} is not a recipe of this version: {error}") from None
        values = dict(saved)
        for key in self.keys():
            if (given := flags.get(key.param)) is None:
                continue
            value, old = convert(key, given, key.flag, text=True), getattr(before, key.name)
            if value != old and key.name not in self.changeable:
                raise ConfigError(
                    f"{key.flag}: the run was started with {old}; leave it out, or start a new run"
                )
            values[key.name] = value
        recipe = self.table(**values)
        self.check(recipe, {name: f"--{name.replace('_', '-')}" for name in self.changeable})
        return recipe

    def _read(self, path: str) -> dict[str, Any]:
        is_name = "/" not in path and "." not in path
        packaged = self.packaged.joinpath(f"{path}.toml") if self.packaged is not None and is_name else None
        try:
            source = packaged if packaged is not None and packaged.is_file() else Path(path)
            return tomllib.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = f"; packaged are: {', '.join(self.names())}" if self.names() else ""
            raise ConfigError(f"--recipe: there is no file {path}{known}") from None
        except OSError as error:
            raise ConfigError(f"--recipe: {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None


def save_start(run: Path, subject: str, model: str, recipe: Mapping[str, Any]) -> None:
    """Remember what a run was started with.

    Args:
        subject: what ``model`` is to the run: "target" or "student".

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        text = json.dumps({subject: model, "recipe": dict(recipe)}, indent=2)
        (run / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {run}: {error.strerror}") from error


def saved_start(run: Path, subject: str) -> tuple[str, dict[str, Any]]:
    """(model, recipe) that a run was started with.

    Raises:
        ConfigError: there is no run, or one of another command.
    """
    path = run / RECIPE_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if subject not in saved:
            raise ConfigError(f"--resume: {run} is a run of another command: it has no {subject}")
        return saved[subject], saved["recipe"]
    except FileNotFoundError:
        raise ConfigError(f"--resume: {run} holds no training run ({RECIPE_FILE} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {path} cannot be read: {error}") from None


def check_new_run(run: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: it does.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"{run} is in use; go on with --resume or name another folder")
