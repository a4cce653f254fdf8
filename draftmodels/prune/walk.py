"""The walk through a target's blocks: each is loaded, run, pruned and run again before the next one is touched.

Memory: one dense block, the Gram matrices of its inputs, the states of all texts before it, and the values that are
kept so far. What a block is calibrated on is what the pruned blocks before it give, as it will be when it is served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.draftmodels.distill.blocks import Block
from paceline.draftmodels.prune.allocation import outlier_ratio, owl, uniform
from paceline.draftmodels.prune.config import Recipe
from paceline.draftmodels.prune.goal import Goal, Pruned
from paceline.draftmodels.prune.inputs import LINEARS, SHARED_INPUTS, Grams, output_error
from paceline.draftmodels.prune.magnitude import magnitude
from paceline.draftmodels.prune.pool import Pool
from paceline.draftmodels.prune.show import Meter
from paceline.draftmodels.prune.sparsegpt import InverseFactor, inverse_factor, sparsegpt
from paceline.draftmodels.prune.stream import Stream
from paceline.draftmodels.prune.values import restored, stored
from paceline.draftmodels.prune.wanda import wanda, wanda_scores
from paceline.kernels.formats import SparseWeight
from paceline.server.errors import DataError
from paceline.server.models.config import ModelConfig
from paceline.server.models.llama import Fetch


@dataclass(frozen=True, slots=True)
class LinearFigures:
    """One pruned linear.

    Attributes:
        sparsity: share of its weights that are left out.
        error: squared error of its outputs relative to the outputs, on the calibration text as it reaches it.
    """

    layer: int
    linear: str
    sparsity: float
    error: float


@dataclass
class Streams:
    """The texts on their way: calibration through the pruned model, held-out ones through both."""

    calibration: Stream
    held_out_dense: Stream
    held_out: Stream


@dataclass(frozen=True, slots=True)
class _Task:
    """One linear to prune: its dense weight, X X^T of its inputs and, for SparseGPT, the factor of that."""

    name: str
    weight: Tensor
    gram: Tensor
    factor: InverseFactor | None


class Walk:
    """Prunes block after block.

    Args:
        fetch: gives tensors in fp32 on the device to work on.
        pool: linears are pruned on its threads.
        meter: told of each piece of work, see ``pieces``.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, fetch: Fetch, pool: Pool, meter: Meter) -> None:
        self._recipe, self._config, self._fetch = recipe, config, fetch
        self._pool, self._meter = pool, meter
        self.sparse: dict[str, SparseWeight] = {}
        self.figures: list[LinearFigures] = []

    def allocate(self, calibration: Stream) -> list[float]:
        """Sparsity of each block; what decides is the dense model's own activations."""
        sparsity, layers = self._recipe.goal.sparsity, self._config.num_layers
        if self._recipe.allocation == "uniform":
            return uniform(sparsity, layers)
        stream, ratios = calibration.twin(), []
        for layer in range(layers):
            self._meter.layer("looking for outliers in", layer)
            block = load_block(self._config, layer, self._fetch)
            grams = self._collect(block, layer, stream, move=True)
            ratios.append(self._outliers(block, grams))
        return owl(ratios, sparsity, self._recipe.outlier_bound)

    def prune(self, streams: Streams, sparsities: Sequence[float]) -> None:
        """Prune all blocks and take the texts through them.

        Raises:
            DataError: activations that are not finite.
            ArtifactError: weights that do not fit the type of the values.
        """
        for layer, sparsity in enumerate(sparsities):
            self._meter.layer("pruning", layer)
            block = load_block(self._config, layer, self._fetch)
            streams.held_out_dense.through(block, layer, after=self._meter.advance)
            grams = self._collect(block, layer, streams.calibration, move=False)
            self._prune_block(block, layer, grams, Goal(self._recipe.goal.pattern, sparsity))
            streams.calibration.through(block, layer, after=self._meter.advance)
            streams.held_out.through(block, layer, after=self._meter.advance)

    def _collect(self, block: Block, layer: int, stream: Stream, *, move: bool) -> Grams:
        grams = Grams(block)
        stream.through(block, layer, move=move, grams=grams, after=self._meter.advance)
        for group in SHARED_INPUTS:
            if not torch.isfinite(grams[group]).all():
                raise DataError(
                    f"layer {layer}: inputs of {group[0]} are not finite numbers on this text; "
                    "see that the target's weights are whole, or take other text"
                )
        return grams

    def _outliers(self, block: Block, grams: Grams) -> float:
        scores = [
            wanda_scores(_weight(block, name), grams[group].diagonal())
            for group in SHARED_INPUTS
            for name in group
        ]
        return outlier_ratio(scores, self._recipe.outlier_factor)

    def _prune_block(self, block: Block, layer: int, grams: Grams, goal: Goal) -> None:
        """Replace the weights of all linears; they read the same inputs, whatever became of each other."""
        factors = self._factors(layer, grams)
        tasks = [
            _Task(f"model.layers.{layer}.{name}.weight", _weight(block, name), grams[group], factor)
            for group, factor in zip(SHARED_INPUTS, factors, strict=True)
            for name in group
        ]
        done = self._pool.map(lambda task: self._prune_linear(task, goal), tasks)
        for name, task, (kept, weight, error) in zip(LINEARS, tasks, done, strict=True):
            block.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
            self.sparse[task.name] = kept
            self.figures.append(LinearFigures(layer, name, kept.sparsity, error))
            self._meter.error(error)
            self._meter.advance()

    def _factors(self, layer: int, grams: Grams) -> list[InverseFactor | None]:
        """One per group of linears; None for methods that need none."""
        if self._recipe.method != "sparsegpt":
            return [None] * len(SHARED_INPUTS)
        wanted = self._recipe.relative_damping
        factors = list(self._pool.map(lambda group: inverse_factor(grams[group], wanted), SHARED_INPUTS))
        for group, factor in zip(SHARED_INPUTS, factors, strict=True):
            if factor.damping > wanted:
                self._meter.display.note(
                    f"layer {layer}, {', '.join(group)}: the Hessian could not be factorised with a damping of "
                    f"{wanted:g}; took {factor.damping:g}"
                )
        return list(factors)

    def _prune_linear(self, task: "_Task", goal: Goal) -> tuple[SparseWeight, Tensor, float]:
        """What is stored, the matrix that it stands for, and the error of its outputs."""
        pruned = self._pruned(task.weight, task.gram, task.factor, goal)
        kept = stored(pruned, goal.pattern, self._recipe.values, task.name)
        weight = restored(kept, task.weight.device)
        return kept, weight, output_error(task.weight, weight, task.gram)

    def _pruned(self, dense: Tensor, gram: Tensor, factor: InverseFactor | None, goal: Goal) -> Pruned:
        if factor is not None:
            return sparsegpt(dense, factor, goal, block_size=self._recipe.columns_per_block)
        if self._recipe.method == "wanda":
            return wanda(dense, gram.diagonal(), goal)
        return magnitude(dense, goal)


def pieces(recipe: Recipe, layers: int, calibration: Stream, held_out: Stream) -> int:
    """Pieces of work that a walk reports to its meter."""
    per_layer = 2 * len(calibration.states) + 2 * len(held_out.states) + len(LINEARS)
    return layers * (per_layer + (len(calibration.states) if recipe.allocation == "owl" else 0))


def load_block(config: ModelConfig, layer: int, fetch: Fetch) -> Block:
    """One dense block of the target."""
    with torch.device("meta"):
        block = Block(config)
    tensors: Mapping[str, Tensor] = {
        name: fetch(f"model.layers.{layer}.{name}") for name in block.state_dict()
    }
    block.load_state_dict(tensors, assign=True)
    return block.requires_grad_(False)


def _weight(block: Block, name: str) -> Tensor:
    return block.get_parameter(f"{name}.weight").detach()
