"""The recipe of an expert's job: the keys that only it has; ``finetune.recipe`` has the others.

Contradictions are errors, not silently ignored keys. Knows nothing of how training is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from paceline.draftmodels.finetune.recipe import CHANGEABLE, FinetuneRecipe
from paceline.draftmodels.jobs.budget import Budget
from paceline.draftmodels.jobs.recipes import Places, RecipeKind
from paceline.server.config.schema import Key, key_field
from paceline.server.errors import ConfigError

#: Passes over the data if there is no limit.
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Recipe(FinetuneRecipe):
    """How to make an expert, from what and for how long. None stands for "auto" or "none", see each key's help."""

    data: str | None = key_field(
        "JSONL file to train on: per line a prompt with its answer, or messages.", None, none_word="none"
    )
    learn: Literal["answers", "all"] = key_field(
        "Tokens that have a loss: those of answers with the one that ends them, or those of prompts, too.",
        "answers",
    )
    sequence_tokens: int = key_field(
        "Longest sequence, tokens: answers are cut short, longer prompts are left out.", 512, low=2
    )
    lr: float = key_field("Peak learning rate; it falls to 0 in a straight line.", 1e-4, above=0)
    warm_up: int = key_field("Steps in which the rate rises.", 10, low=0)
    train_embedding: bool = key_field("Train the embedding and the head, too.", True)
    held_out: int = key_field("Prompts kept out of training, to measure on.", 64, low=1)
    template: Literal["auto", "chat", "plain"] = key_field(
        "How a prompt is put to the model: through its chat template, as the text that it is (plain), or by the "
        "template if there is one (auto).",
        "auto",
    )
    epochs: float | None = key_field(
        f"Stop after this many passes over the data; {DEFAULT_EPOCHS:.0f} if there is no other limit.",
        None,
        none_word="none",
        above=0,
    )
    store: Literal["bf16", "fp32"] = key_field("Type of the stored weights.", "bf16")
    answer_prompts: int = key_field(
        "Of the held-out prompts, how many are answered greedily at the end to count exact matches.",
        64,
        low=0,
    )
    answer_always: bool = key_field("Answer them with every measurement, not only at the end.", False)

    def budget(self, epoch_tokens: int) -> Budget:
        """The limits, 3 epochs if none is given.

        Args:
            epoch_tokens: of all sequences.
        """
        seconds, tokens, steps = self.limits()
        epochs = self.epochs
        if epochs is seconds is tokens is steps is None:
            epochs = DEFAULT_EPOCHS
        if epochs is not None:
            in_epochs = max(round(epochs * epoch_tokens), 1)
            tokens = in_epochs if tokens is None else min(tokens, in_epochs)
        return Budget(seconds, tokens, steps)


@cache
def _kind() -> RecipeKind[Recipe]:
    return RecipeKind(Recipe, None, _check, (*CHANGEABLE, "epochs", "answer_prompts"))


def recipe_keys() -> tuple[Key, ...]:
    """Every key of a recipe."""
    return _kind().keys()


def load_recipe(path: str | None, flags: Mapping[str, object]) -> Recipe:
    """See ``RecipeKind.load``."""
    return _kind().load(path, flags)


def resumed_recipe(saved: Mapping[str, Any], flags: Mapping[str, object], where: str) -> Recipe:
    """See ``RecipeKind.resumed``."""
    return _kind().resumed(saved, flags, where)


def _check(recipe: Recipe, places: Places) -> None:
    """Refuse keys that would have no effect, and values that only make sense together."""
    if recipe.data is None:
        raise ConfigError("--data: name a JSONL file to train on (lines with prompt and answer, or messages)")
    if recipe.answer_always and not recipe.answer_prompts:
        place = places.get("answer_always", "answer_always")
        raise ConfigError(f"{place}: there is nothing to answer, as answer_prompts is 0")
    recipe.check_limits(places)
