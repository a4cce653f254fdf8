"""The recipe of a recovery job: every key once (``jobs.recipes`` fills it from a file and flags).

Contradictions are errors, not silently ignored keys. Knows nothing of how training is done.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from paceline.draftmodels.jobs.budget import Budget, Patience, parse_count, parse_seconds
from paceline.draftmodels.jobs.recipes import Places, RecipeKind
from paceline.server.config.schema import Key, key_field
from paceline.server.errors import ConfigError

#: Unless the recipe says otherwise.
DEFAULT_TOKENS = 300_000
#: What a resumed job may have otherwise than before.
_CHANGEABLE = ("max_time", "max_tokens", "max_steps", "patience", "threads", "checkpointing")
#: Least fall of the log of the perplexity that counts as better, for early stopping: 0.1%.
_LEAST_GAIN = 0.001


@dataclass(frozen=True)
class Recipe:
    """How to recover a student, on what and for how long. None stands for "auto" or "none", see each key's help."""

    data: str | None = key_field(
        "Texts, or prompts with answers, to train on: a JSONL file, or text with one text per line.",
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
    learn: Literal["answers", "all"] = key_field(
        "Tokens that CE and KL are over: those of answers, and all of a text without a prompt; or prompts, too.",
        "answers",
    )
    sequence_tokens: int = key_field(
        "Longest sequence, tokens: longer texts are cut into pieces, answers are cut short.", 512, low=2
    )
    batch_tokens: int = key_field("Tokens per forward, prompts included.", 1024, low=1)
    accumulate: int = key_field("Forwards whose gradients make one step, over all ranks.", 1, low=1)
    lr: float = key_field("Peak learning rate; it falls to 0 in a straight line.", 3e-4, above=0)
    warm_up: int = key_field("Steps in which the rate rises.", 20, low=0)
    weight_decay: float = key_field("AdamW's weight decay of matrices.", 0.0, low=0)
    grad_clip: float = key_field("Longest gradient, over all parameters.", 1.0, above=0)
    train_embedding: bool = key_field("Train the embedding and the head, too.", False)
    dtype: Literal["fp32", "bf16"] | None = key_field(
        "Arithmetic of matrices (autocast), weights stay fp32; auto is bf16 where the processor multiplies it.",
        None,
    )
    checkpointing: bool = key_field(
        "Keep only the outputs of blocks for the backward pass, and compute the rest again: less memory, slower.",
        False,
    )
    device: Literal["cpu", "cuda"] = key_field("Where student and teacher run.", "cpu")
    threads: int | None = key_field("CPU threads; auto takes the physical cores.", None, low=1, high=1024)
    max_tokens: str | None = key_field(
        f"Stop after this many trained tokens, such as 2M; {DEFAULT_TOKENS // 1000}k if there is no other limit.",
        None,
        none_word="none",
    )
    max_steps: str | None = key_field("Stop after this many steps.", None, none_word="none")
    max_time: str | None = key_field("Stop after this time, such as 20m.", None, none_word="none")
    patience: int = key_field(
        "Stop after this many measurements without a better perplexity; 0 never.", 0, low=0
    )
    held_out: int = key_field("Texts or prompts kept out of training, to measure on.", 32, low=1)
    eval_every: int = key_field("Measure every so many steps.", 50, low=1)
    quantize: Literal["int8"] | None = key_field(
        "How the exported values are stored: int8 with one scale per output row, or none (fp32).",
        "int8",
        none_word="none",
    )
    qat_steps: int = key_field(
        "Of the last steps, how many are trained through the rounding to int8.", 0, low=0
    )
    seed: int = key_field("Seed of everything random.", 0, low=0)

    @property
    def budget(self) -> Budget:
        """The limits, 300k tokens if none is given."""
        seconds = None if self.max_time is None else parse_seconds(self.max_time, "max_time")
        tokens = None if self.max_tokens is None else parse_count(self.max_tokens, "max_tokens")
        steps = None if self.max_steps is None else parse_count(self.max_steps, "max_steps")
        return Budget(seconds, DEFAULT_TOKENS if seconds is tokens is steps is None else tokens, steps)

    @property
    def stopping(self) -> Patience:
        """When to stop early; scores are minus the log of perplexities."""
        return Patience(self.patience, _LEAST_GAIN)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step, over all ranks."""
        return self.batch_tokens * self.accumulate

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks the teacher; measuring always does."""
        return self.w_kl > 0 or self.w_sq > 0

    def rate(self, step: int, used: float) -> float:
        """Learning rate of step ``step`` (from 0) after the share ``used`` of the budget: a straight line to 0, times a
        warm-up."""
        rising = min((step + 1) / self.warm_up, 1.0) if self.warm_up else 1.0
        return self.lr * rising * max(1.0 - used, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """By the names that files use, as provenance; files by their names alone."""
        plain = asdict(self)
        for name in ("data", "teacher"):
            value = plain[name]
            plain[name] = Path(value).name if value is not None and Path(value).exists() else value
        return plain


@cache
def _kind() -> RecipeKind[Recipe]:
    packaged = files("paceline.draftmodels.sparse_finetune").joinpath("recipes")
    return RecipeKind(Recipe, packaged, _check, _CHANGEABLE)


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
    for name, parse in (("max_time", parse_seconds), ("max_tokens", parse_count), ("max_steps", parse_count)):
        if getattr(recipe, name) is not None:
            parse(getattr(recipe, name), places[name])
