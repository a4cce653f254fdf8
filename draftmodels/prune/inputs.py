"""What the inputs of a block's linears look like: X X^T, collected by hooks while texts run through the block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor, nn

from paceline.draftmodels.distill.blocks import Block

#: Linears of a block by what they read: the first of each group is listened to.
SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS: tuple[str, ...] = tuple(name for group in SHARED_INPUTS for name in group)


#: X X^T of one batch by linear, fp32 [in, in].
Products = dict[str, Tensor]


class Grams:
    """One matrix per group of ``SHARED_INPUTS``.

    Products of one batch are fp32; they are added up in fp64, as small eigenvalues would drown in the rounding of large
    ones. Batches may run on several threads at once; whoever adds them up keeps their order, for the same sums.
    """

    def __init__(self, block: Block) -> None:
        self._sums: dict[str, Tensor] = {}
        self._thread = local()
        for group in SHARED_INPUTS:
            block.get_submodule(group[0]).register_forward_pre_hook(self._hook(group[0]))

    def __getitem__(self, group: Sequence[str]) -> Tensor:
        """X X^T of a group's inputs over all rows so far, fp64 [in, in]."""
        return self._sums[group[0]]

    @contextmanager
    def listening(self) -> Iterator[Products]:
        """While this lasts, what this thread runs through the block leaves its products in the mapping."""
        products: Products = {}
        self._thread.products = products
        try:
            yield products
        finally:
            self._thread.products = None

    def add(self, products: Products) -> None:
        """Count what a batch has left."""
        for name, product in products.items():
            wide = product.to(torch.float64)
            self._sums[name] = self._sums[name].add_(wide) if name in self._sums else wide

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            products: Products | None = getattr(self._thread, "products", None)
            if products is not None:
                products[name] = inputs[0].T @ inputs[0]

        return keep


def output_error(dense: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Squared error of a linear's outputs relative to the outputs, ||(W - W') X||^2 / ||W X||^2; 0 where W X is 0.

    Args:
        dense, pruned: [out, in].
        gram: X X^T, [in, in], of any float type.
    """
    gram = gram.to(dense.dtype)
    change = dense - pruned
    whole = float(((dense @ gram) * dense).sum())
    return float(((change @ gram) * change).sum()) / whole if whole > 0 else 0.0
