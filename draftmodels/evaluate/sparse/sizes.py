"""How much of a model's linears is left out, layer by layer, and how many bytes a forward reads."""

import re
from dataclasses import dataclass
from math import prod

from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig
from paceline.server.models.loader import LoadedModel
from paceline.server.models.native_form import stored_sparse

_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.weight")


@dataclass(frozen=True, slots=True)
class LayerSparsity:
    """Share of weights left out, of one block and of each of its linears."""

    layer: int
    sparsity: float
    linears: dict[str, float]


def sparsity_per_layer(checkpoint: Checkpoint, config: ModelConfig) -> list[LayerSparsity]:
    """Per block; what is stored dense counts as whole."""
    kept: dict[int, dict[str, tuple[int, int]]] = {}
    for name in config.tensor_names():
        match = _LINEAR.fullmatch(name)
        if match is None:
            continue
        total = prod(config.tensor_shape(name))
        weight = stored_sparse(checkpoint, name)
        kept.setdefault(int(match[1]), {})[match[2]] = (total if weight is None else weight.nnz, total)
    return [
        LayerSparsity(layer, _left_out(list(own.values())), {name: _left_out([n]) for name, n in own.items()})
        for layer, own in sorted(kept.items())
    ]


def overall(layers: list[LayerSparsity]) -> float:
    """Of all blocks together: they have equal shapes."""
    return sum(layer.sparsity for layer in layers) / len(layers)


def bytes_per_forward(model: LoadedModel) -> int:
    """Weight bytes that a forward with logits reads."""
    return model.weights.bytes_per_forward


def _left_out(counts: list[tuple[int, int]]) -> float:
    return 1 - sum(nnz for nnz, _ in counts) / sum(total for _, total in counts)
