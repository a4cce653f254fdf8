"""The learning rate of a draft's training, by the used share of the budget, and its AdamW."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.jobs.optim import adamw

#: A second moment that forgets within about 20 steps, usual where batches are small and training is short.
_BETAS = (0.9, 0.95)


def make_optimizer(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    return adamw(parameters, lr=recipe.peak_lr, betas=_BETAS, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, used: float) -> float:
    """Rate after the share ``used`` of the budget: rises over ``warmup``, then falls to ``final_lr`` of the peak."""
    if used < recipe.warmup:
        return recipe.peak_lr * max(used / recipe.warmup, 0.01)
    done = min((used - recipe.warmup) / (1 - recipe.warmup), 1.0)
    low = recipe.final_lr
    return recipe.peak_lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
