"""What ``paceline sparsify`` is asked to do: every option once; those without effect are refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paceline.server.config.schema import Key, key_field, keys_of
from paceline.server.config.values import convert
from paceline.server.errors import ConfigError

if TYPE_CHECKING:  # these need torch, which the command's help shall not wait for
    from paceline.draftmodels.prune.goal import Goal

#: Calibration text that the target writes itself.
SELF = "self"
_DAMPING, _BLOCK_SIZE, _SPARSITY = 0.01, 128, 0.5
#: OWL's lambda and M, as in the paper for models of 7B and more.
_LAMBDA, _OUTLIER_FACTOR = 0.08, 5.0


@dataclass(frozen=True)
class Recipe:
    """How to prune. None stands for "auto", see each option's help."""

    method: Literal["sparsegpt", "wanda", "magnitude"] = key_field(
        "Which weights go; sparsegpt also adapts those that stay.", "sparsegpt"
    )
    sparsity: float | None = key_field(
        "Share of the weights to remove; auto: 0.5, or what an n:m pattern says.", None, above=0, high=0.99
    )
    pattern: str = key_field(
        'Where zeros stand: "unstructured", or n of every m inputs are kept: 2:4, 16:32, 16:64, ...',
        "unstructured",
    )
    allocation: Literal["uniform", "owl"] = key_field(
        "Sparsity of the layers: all alike, or less of those with many outliers.", "uniform"
    )
    owl_lambda: float | None = key_field(
        f"Furthest that a layer's sparsity may be from the mean (allocation owl); auto: {_LAMBDA}.",
        None,
        above=0,
        high=0.5,
    )
    owl_outliers: float | None = key_field(
        f"Scores over this many times the mean are outliers (allocation owl); auto: {_OUTLIER_FACTOR:g}.",
        None,
        above=1,
    )
    calibration: str = key_field(
        'Text whose activations decide: a JSONL or text file, or "self" (the target writes it).', SELF
    )
    samples: int = key_field("Sequences to calibrate on.", 64, low=1)
    sequence_tokens: int = key_field("Longest sequence, tokens.", 512, low=8)
    measure: str | None = key_field(
        "JSONL or text file to measure perplexity on; auto: text held out of the calibration's.", None
    )
    held_out: int = key_field("Sequences to measure perplexity on.", 32, low=1)
    damping: float | None = key_field(
        f"Added to the Hessian's diagonal, relative to its mean (sparsegpt); auto: {_DAMPING}.", None, above=0
    )
    block_size: int | None = key_field(
        f"Columns whose mask is chosen at once (sparsegpt); auto: {_BLOCK_SIZE}.", None, low=1
    )
    values: Literal["fp32", "fp16", "bf16", "int8"] = key_field(
        "Type of the kept weights in the artifact; fp32 is what train-sparse starts from.", "bf16"
    )
    weights: Literal["fp32", "bf16", "int8"] | None = key_field(
        "Weight format in which the target writes calibration text (calibration self); auto as when serving.",
        None,
        none_word="auto",
    )
    threads: int | None = key_field("CPU threads; auto takes the physical cores.", None, low=1, high=1024)
    device: Literal["cpu", "cuda"] = key_field("Where the layers are run and pruned.", "cpu")
    seed: int = key_field("Seed of everything random.", 0, low=0)

    @property
    def goal(self) -> "Goal":
        """Pattern and mean sparsity."""
        from paceline.draftmodels.prune.goal import Goal
        from paceline.kernels.formats import Pattern

        pattern = Pattern.parse(self.pattern)
        density = pattern.density
        return Goal(pattern, (self.sparsity or _SPARSITY) if density is None else 1.0 - density)

    @property
    def relative_damping(self) -> float:
        """Of SparseGPT."""
        return _DAMPING if self.damping is None else self.damping

    @property
    def columns_per_block(self) -> int:
        """Of SparseGPT."""
        return _BLOCK_SIZE if self.block_size is None else self.block_size

    @property
    def outlier_bound(self) -> float:
        """OWL's lambda."""
        return _LAMBDA if self.owl_lambda is None else self.owl_lambda

    @property
    def outlier_factor(self) -> float:
        """OWL's M."""
        return _OUTLIER_FACTOR if self.owl_outliers is None else self.owl_outliers

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: what was done, without what had no part in it; files by their names alone."""
        done = {name: value for name, value in asdict(self).items() if value is not None}
        done |= {"sparsity": self.goal.sparsity}
        if self.method == "sparsegpt":
            done |= {"damping": self.relative_damping, "block_size": self.columns_per_block}
        if self.allocation == "owl":
            done |= {"owl_lambda": self.outlier_bound, "owl_outliers": self.outlier_factor}
        files = {name: Path(done[name]).name for name in ("calibration", "measure") if name in done}
        return done | files


@cache
def recipe_keys() -> tuple[Key, ...]:
    """Every option."""
    return tuple(keys_of("recipe", Recipe).values())


def recipe_from(flags: Mapping[str, object]) -> Recipe:
    """The recipe that flags ask for.

    Raises:
        ConfigError: a wrong value, options that contradict each other or would have no effect.
    """
    given = {
        key.name: convert(key, flags[key.param], key.flag, text=True)
        for key in recipe_keys()
        if flags.get(key.param) is not None
    }
    recipe = Recipe(**given)
    _check_pattern(recipe)
    _check_effects(recipe, {name for name, value in given.items() if value is not None})
    return recipe


def _check_pattern(recipe: Recipe) -> None:
    from paceline.kernels.formats import FormatError, Pattern

    try:
        pattern = Pattern.parse(recipe.pattern)
    except FormatError as error:
        raise ConfigError(f"--pattern: {error}") from None
    if pattern.structured and recipe.sparsity not in (None, recipe.goal.sparsity):
        raise ConfigError(
            f"--sparsity: {pattern} removes {recipe.goal.sparsity:g} of the weights, not {recipe.sparsity:g}; "
            "leave it out"
        )
    if pattern.structured and recipe.method == "sparsegpt" and recipe.columns_per_block % pattern.m:
        raise ConfigError(
            f"--block-size: {recipe.columns_per_block} columns are not whole groups of {pattern}; "
            f"take a multiple of {pattern.m}"
        )


def _check_effects(recipe: Recipe, given: set[str]) -> None:
    def refuse(names: tuple[str, ...], why: str) -> None:
        for name in names:
            if name in given:
                raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave it out")

    if recipe.method != "sparsegpt":
        refuse(("damping", "block_size"), f"only method sparsegpt has it, and method is {recipe.method}")
    if recipe.calibration != SELF:
        refuse(("weights",), f"calibration text comes from {recipe.calibration}")
    if recipe.allocation != "owl":
        refuse(("owl_lambda", "owl_outliers"), "only allocation owl has it, and allocation is uniform")
        return
    if recipe.goal.pattern.structured:
        raise ConfigError(
            f"--allocation: every layer of {recipe.pattern} has the same sparsity; take uniform"
        )
    room = min(recipe.goal.sparsity, 1.0 - recipe.goal.sparsity)
    if recipe.outlier_bound >= room:
        raise ConfigError(
            f"--owl-lambda: {recipe.outlier_bound:g} around a sparsity of {recipe.goal.sparsity:g} is not between "
            f"0 and 1 everywhere; take less than {room:g}"
        )
