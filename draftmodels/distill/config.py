"""The recipe of a draft's training job: every key once (``jobs.recipes`` fills it from a file and flags).

Contradictions are errors, not silently ignored keys. Knows nothing of how training is done.
"""

import re
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
DEFAULT_SECONDS = 20 * 60.0
#: Peak learning rates. At that of a new draft a trained one forgets first (DESIGN.md, a draft for a student).
_LR, _TRAINED_LR = 2e-3, 4e-4
#: What a resumed job may have otherwise than before.
_CHANGEABLE = ("max_time", "max_tokens", "max_steps", "patience", "threads")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, how and for how long. None stands for "auto" or "full", see each key's help."""

    init: str = key_field(
        'Where the draft starts: "feature" (reads the target\'s state), "layers:0,1,28,29" (cut from the target), '
        '"random", or a small model of the target\'s tokenizer: catalog name, hf:ORG/NAME or folder.',
        "feature",
    )
    layers: int | None = key_field(
        "Decoder layers of a feature (1 or 2) or random draft; auto: 1 or 2.", None, low=1
    )
    hidden: int | None = key_field("Width of a random draft; auto: the target's.", None, low=8)
    heads: int | None = key_field("Attention heads of a random draft; auto: by width.", None, low=1)
    kv_heads: int | None = key_field("KV heads of a random draft; auto: by heads.", None, low=1)
    ffn: int | None = key_field("Feed-forward width of a random draft; auto: by width.", None, low=8)
    block_from: str | None = key_field(
        "Target layer that a feature draft's first block starts from, such as 28.", None, none_word="random"
    )
    join_from: Literal["state", "random"] = key_field(
        "What a feature draft's joining matrix starts as: one that passes the target's state on, or random.",
        "state",
    )
    draft_vocab: int | None = key_field(
        "Ids that the draft proposes: those most likely in the target's own text.",
        None,
        none_word="full",
        low=2,
    )
    train_head: bool | None = key_field("Train the head; auto: only where it starts at random.", None)
    train_embedding: bool | None = key_field(
        "Train the embedding; auto: only where it starts at random.", None
    )
    prompts: str = key_field('Prompts: a JSONL or text file, or "self" (the target writes its own).', "self")
    source: Literal["fixed", "target", "draft", "mixed"] = key_field(
        "Who writes the answers: the file (fixed), the target, the current draft, or draft and target mixed.",
        "target",
    )
    lambda_: float | None = key_field(
        "Share of prompts that the draft answers (source mixed); auto: 0.5.",
        None,
        flag="--lambda",
        low=0,
        high=1,
    )
    temperature: str = key_field(
        "Sampling temperature of answers, 0 is greedy; several, such as 0,0.5,1, take turns among the prompts.",
        "1",
    )
    answer_tokens: int = key_field("Longest answer, tokens.", 128, low=1)
    prompt_tokens: int = key_field("Longest prompt, tokens; longer ones are left out.", 256, low=1)
    self_prompts: int = key_field(
        "How many prompts the target writes (prompts self); used again, with new answers, when all were used.",
        1024,
        low=1,
    )
    round_prompts: int = key_field("Prompts answered per round.", 64, low=1)
    reuse: int = key_field("How many rounds each answer is trained in.", 4, low=1)
    loss: str = key_field(
        "Distance: fkl, rkl, jsd, jsd:BETA, tvd, lk, lk-hybrid, or ce (hard labels).", "fkl"
    )
    loss_temperature: float = key_field("Temperature of both distributions in the loss.", 1.0, above=0)
    top_k: int | None = key_field(
        "Teacher's tokens per position, the rest as one mass; full takes all.", None, none_word="full", low=1
    )
    unroll: int | None = key_field(
        "Draft steps that a feature draft is trained for at once; auto: 2.", None, low=1, high=8
    )
    step_decay: float = key_field(
        "Weight of each further unrolled step, relative to the one before.", 1.0, above=0
    )
    taid: float | None = key_field(
        "TAID: the teacher's share in an interpolated teacher at the start, growing to 1; none is the plain teacher.",
        None,
        none_word="none",
        low=0,
        high=1,
    )
    lr: float | None = key_field(
        f"Peak learning rate; auto: {_LR:g}, or {_TRAINED_LR:g} where init is a trained draft or model.",
        None,
        above=0,
    )
    warmup: float = key_field("Share of the budget in which the rate rises.", 0.03, low=0, high=0.5)
    final_lr: float = key_field("Rate at the end, as a share of the peak.", 0.1, low=0, high=1)
    weight_decay: float = key_field("AdamW's weight decay of matrices.", 0.0, low=0)
    grad_clip: float = key_field("Longest gradient, over all parameters.", 1.0, above=0)
    batch_tokens: int = key_field("Rows per step, prompts included.", 1024, low=1)
    precision: Literal["fp32", "bf16"] = key_field("Arithmetic of matrices; weights stay fp32.", "bf16")
    device: Literal["cpu", "cuda"] = key_field("Where draft and target run.", "cpu")
    threads: int | None = key_field("CPU threads; auto takes the physical cores.", None, low=1, high=1024)
    weights: Literal["auto", "fp32", "bf16", "int8"] = key_field("Weight format of the target.", "auto")
    streams: int = key_field("Answers written at the same time.", 32, low=1)
    max_time: str | None = key_field("Stop after this time, such as 20m.", None, none_word="none")
    max_tokens: str | None = key_field(
        "Stop after this many trained tokens, such as 2M.", None, none_word="none"
    )
    max_steps: str | None = key_field("Stop after this many steps.", None, none_word="none")
    patience: int = key_field("Stop after this many measurements without a better tau; 0 never.", 0, low=0)
    held_out: int = key_field("Prompts kept out of training, to measure on.", 32, low=1)
    eval_rounds: int = key_field("Measure alpha and tau every so many rounds.", 4, low=1)
    eval_tokens: int = key_field("Longest answer when measuring, tokens.", 64, low=1)
    eval_temperature: float = key_field("Temperature when measuring.", 1.0, low=0)
    draft_tokens: int = key_field("Draft tokens per block when measuring.", 4, low=1, high=16)
    seed: int = key_field("Seed of everything random.", 0, low=0)

    def steps(self, *, reads_state: bool) -> int:
        """Unrolled steps; independent drafts have one, as on given text their steps are all alike."""
        return (self.unroll or 2) if reads_state else 1

    def step_weights(self, steps: int) -> tuple[float, ...]:
        """Weight of each unrolled step's loss; they sum to 1."""
        raw = [self.step_decay**k for k in range(steps)]
        return tuple(weight / sum(raw) for weight in raw)

    @property
    def peak_lr(self) -> float:
        """The rate after warming up."""
        if self.lr is not None:
            return self.lr
        return _LR if self.init in ("feature", "random") or self.init.startswith("layers:") else _TRAINED_LR

    @property
    def from_draft(self) -> float:
        """Share of prompts that the draft answers."""
        shares = {
            "fixed": 0.0,
            "target": 0.0,
            "draft": 1.0,
            "mixed": 0.5 if self.lambda_ is None else self.lambda_,
        }
        return shares[self.source]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Of answers, in turn."""
        return _temperatures(self.temperature, "temperature")

    @property
    def budget(self) -> Budget:
        """The limits, 20 minutes if none is given."""
        seconds = None if self.max_time is None else parse_seconds(self.max_time, "max_time")
        tokens = None if self.max_tokens is None else parse_count(self.max_tokens, "max_tokens")
        steps = None if self.max_steps is None else parse_count(self.max_steps, "max_steps")
        return Budget(DEFAULT_SECONDS if seconds is tokens is steps is None else seconds, tokens, steps)

    @property
    def stopping(self) -> Patience:
        """When to stop early."""
        return Patience(self.patience)

    def as_dict(self) -> dict[str, Any]:
        """By the names that files use, as provenance; a prompt file by its name alone."""
        plain = {name.rstrip("_"): value for name, value in asdict(self).items()}
        return plain | {"prompts": self.prompts if self.prompts == "self" else Path(self.prompts).name}


@cache
def _kind() -> RecipeKind[Recipe]:
    packaged = files("paceline.draftmodels.distill").joinpath("recipes")
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

    def refuse(name: str, why: str) -> None:
        if name in places:
            raise ConfigError(f"{places[name]}: {why}")

    _check_init(recipe, places, refuse)
    if recipe.source != "mixed":
        refuse("lambda_", f'only source "mixed" has a share of the draft, and source is "{recipe.source}"')
    if recipe.prompts != "self":
        refuse("self_prompts", f"prompts come from {recipe.prompts}")
    if recipe.source == "fixed":
        if recipe.prompts == "self":
            raise ConfigError('source "fixed" trains on the answers of a file; name it with --prompts FILE')
        refuse("temperature", 'source "fixed" samples nothing')
    _temperatures(recipe.temperature, places.get("temperature", "temperature"))
    if recipe.loss != "ce":
        from paceline.draftmodels.losses import loss_named

        try:
            loss_named(recipe.loss)
        except ConfigError as error:
            raise ConfigError(f"{places['loss']}: {error}") from None
    else:
        refuse("taid", "loss ce has no teacher to interpolate")
    if recipe.top_k is not None and recipe.draft_vocab is not None and recipe.top_k >= recipe.draft_vocab:
        raise ConfigError(f"top_k {recipe.top_k} is not below draft_vocab {recipe.draft_vocab}; leave it out")
    for name, parse in (("max_time", parse_seconds), ("max_tokens", parse_count), ("max_steps", parse_count)):
        if getattr(recipe, name) is not None:
            parse(getattr(recipe, name), places[name])


def _temperatures(text: str, place: str) -> tuple[float, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise ConfigError(f'{place}: expected temperatures such as 1 or 0,0.5,1, got "{text}"')
    return tuple(float(part) for part in parts)


def _check_init(recipe: Recipe, places: Places, refuse: Any) -> None:
    feature, random = recipe.init == "feature", recipe.init == "random"
    if not (feature or random):
        refuse(
            "layers", f'the layers of init "{recipe.init}" are given; only feature and random take a number'
        )
    if not random:
        for name in ("hidden", "heads", "kv_heads", "ffn"):
            refuse(name, f'init "{recipe.init}" has its own; only random takes it')
    if not feature:
        for name in ("block_from", "join_from"):
            refuse(name, f'only init "feature" has it, and init is "{recipe.init}"')
    if random or recipe.init.startswith("layers:"):  # what a checkpoint is shows when it is opened
        for name in ("unroll", "step_decay"):
            refuse(name, f'only drafts that read the target\'s state have it, and init is "{recipe.init}"')
    if feature and (recipe.layers or 1) > 2:
        raise ConfigError(f"{places['layers']}: a feature draft has 1 or 2 layers, not {recipe.layers}")
    if feature and recipe.train_embedding:
        refuse("train_embedding", "a feature draft reads the target's embedding, which is frozen")
