"""How much of a checkpoint is left out, for whoever shows it: read from shapes, not from weights."""

import math
from dataclasses import dataclass

from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig
from paceline.server.models.native_form import NativeCheckpoint


@dataclass(frozen=True, slots=True)
class Sparsity:
    """See the module's docstring.

    Attributes:
        pattern: "dense", "unstructured" or n:m such as "2:4".
        share: of the weights of the blocks' linears, 0 to 1; a linear that is stored dense counts as whole.
    """

    pattern: str = "dense"
    share: float = 0.0


def sparsity(checkpoint: Checkpoint, config: ModelConfig) -> Sparsity:
    """Of a checkpoint; all but sparse artifacts are dense."""
    if not isinstance(checkpoint, NativeCheckpoint) or checkpoint.sparse_form is None:
        return Sparsity()
    total = stored = 0
    for name in config.tensor_names():
        if name.endswith("_proj.weight"):
            size, values = math.prod(config.tensor_shape(name)), checkpoint.num_values(name)
            total, stored = total + size, stored + (size if values is None else values)
    return Sparsity(str(checkpoint.sparse_form.pattern), 1 - stored / total)
