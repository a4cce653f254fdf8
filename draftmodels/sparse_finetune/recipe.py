"""The recipe of a recovery job: every key once (``jobs.recipes`` fills it from a file and flags).

Contradictions are errors, not silently ignored keys. Knows nothing of how training is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Literal

from paceline.draftmodels.finetune.recipe import CHANGEABLE, FinetuneRecipe
from paceline.draftmodels.jobs.budget import Budget
from paceline.draftmodels.jobs.recipes import Places, RecipeKind
from paceline.server.config.schema import Key, key_field
from paceline.server.errors import ConfigError

#: Unless the recipe says otherwise.
DEFAULT_TOKENS = 300_000


@dataclass(frozen=True)
class Recipe(FinetuneRecipe):
    """How to recover a student, on what and for how long. None stands for "auto" or "none", see each key's help."""

    references: ClassVar[tuple[str, ...]] = ("data", "teacher")

    data: str | None = key_field(
        "Texts, or prompts with answers, to train on: a JSONL file, or text with one text per line.",
        None,
        none_word="none",
    )
    learn: Literal["answers", "all"] = key_field(
        "Tokens that CE and KL are over: those of answers, and all of a text without a prompt; or prompts, too.",
        "answers",
    )
    device: Literal["cpu", "cuda"] = key_field("Where student and teacher run.", "cpu")
    max_tokens: str | None = key_field(
        f"Stop after this many trained tokens, such as 2M; {DEFAULT_TOKENS // 1000}k if there is no other limit.",
        None,
        none_word="none",
    )
    teacher: str | None = key_field(
        "Dense model of the same shape; base is the one that the student was pruned from.",
        None,
        none_word="base",
    )
    w_ce: float = key_field("Weight of cross entropy on the data's own tokens.", 1.0, low=0)
    w_kl: float = key_field("Weight of KL(teacher || student) on the logits.", 0.0, low=0)
    w_sq: float = key_field("Weight of SquareHead on the outputs of all blocks.", 1.0, low=0)
    quantize: Literal["int8"] | None = key_field(
        "How the exported values are stored: int8 with one scale per output row, or none (fp32).",
        "int8",
        none_word="none",
    )
    qat_steps: int = key_field(
        "Of the last steps, how many are trained through the rounding to int8.", 0, low=0
    )

    @property
    def budget(self) -> Budget:
        """The limits, 300k tokens if none is given."""
        limits = self.limits()
        return (
            Budget(*limits) if any(limit is not None for limit in limits) else Budget(tokens=DEFAULT_TOKENS)
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks the teacher; measuring always does."""
        return self.w_kl > 0 or self.w_sq > 0


@cache
def _kind() -> RecipeKind[Recipe]:
    packaged = files("paceline.draftmodels.sparse_finetune").joinpath("recipes")
    return RecipeKind(Recipe, packaged, _check, CHANGEABLE)


def recipe_keys() -> tuple[Key, ...]:
    """Every key of a recipe."""
    return _kind().keys()


def load_recipe(path: str | None, flags: Mapping[str, object]) -> Recipe:
    """See ``RecipeKind.load``."""
    return _kind().load(path, flags)


def resumed_recipe(saved: Mapping[str, Any], flags: Mapping[str, object], where: str) -> Recipe:
    """See ``RecipeKind.resumed``."""
    return _kind().resumed(saved, flags, where)


def packaged_recipes() -> list[str]:
    """Names that ``--recipe`` knows beside files."""
    return _kind().names()


def _check(recipe: Recipe, places: Places) -> None:
    """Refuse keys that would have no effect, and values that only make sense together."""
    if recipe.data is None:
        raise ConfigError("--data: name a file to train on (JSONL with prompt and answer, or with text)")
    if recipe.w_ce == recipe.w_kl == recipe.w_sq == 0:
        raise ConfigError("w_ce, w_kl and w_sq are all 0: there is nothing to learn; give one a weight")
    if recipe.w_ce == recipe.w_kl == 0 and recipe.train_embedding:
        raise ConfigError(
            "train_embedding: without CE and KL nothing trains the head; give w_ce or w_kl a weight"
        )
    if recipe.qat_steps and recipe.quantize is None:
        place = places.get("qat_steps", "qat_steps")
        raise ConfigError(f'{place}: there is no rounding to train through, as quantize is "none"')
    recipe.check_limits(places)
