"""The fixed mask of a student: what was pruned stays zero through training, in weights, gradients and moments.

Also the rounding to int8 that the export will do, to look at a student (or train it) as it will be served; and the
packed form of checkpoints, which holds no pruned weights. Knows nothing of losses.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from paceline.draftmodels.finetune.arithmetic import replaced
from paceline.kernels.cpu.int8 import quantize_rows
from paceline.server.errors import ArtifactError


class FixedMasks:
    """The masks of some parameters.

    Args:
        parameters: the sparse linears' weights by name, [out, in].
        kept: bool [out, in] of each.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        assert parameters.keys() == kept.keys()
        self._parameters = dict(parameters)
        # Factors 0 and 1, as multiplying by bf16 takes a tenth of the time of filling by a bool mask.
        self._factors = {name: mask.to(torch.bfloat16) for name, mask in kept.items()}

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, and with them what the optimiser remembers of them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._factors[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights."""
        for name, parameter in self._parameters.items():
            parameter.mul_(self._factors[name])

    def rounded(self) -> AbstractContextManager[None]:
        """The weights as int8 would hold them inside, as they were afterwards.

        Gradients go straight through the rounding (2013: arXiv:1308.3432). Nothing is clipped, as scales follow the
        rows' maxima.
        """
        return replaced(self._parameters, rounded_rows)

    def packed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters and moments (``NAME`` and ``NAME@KIND``) without what is pruned: kept values, [kept]."""
        return {name: self._pack(name, tensor) for name, tensor in tensors.items()}

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``packed``.

        Raises:
            ArtifactError: they are of another mask.
        """
        return {name: self._unpack(name, tensor) for name, tensor in tensors.items()}

    def _pack(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept(name)
        return tensor if kept is None or tensor.shape != kept.shape else tensor[kept]

    def _unpack(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept(name)
        if kept is None or tensor.dim() != 1:
            return tensor
        if len(tensor) != int(kept.sum()):
            raise ArtifactError(
                f"the checkpoint's {name} is of another mask: the student has changed since the run was started"
            )
        whole = tensor.new_zeros(kept.shape)
        whole[kept] = tensor
        return whole

    def _kept(self, name: str) -> Tensor | None:
        """Of a parameter or its moments, bool [out, in] on CPU; None for what is not sparse."""
        factor = self._factors.get(name.partition("@")[0])
        return None if factor is None else factor.bool().cpu()


def rounded_rows(weight: Tensor) -> Tensor:
    """A weight [out, in] as int8 with one scale per output row holds it, in its own type and on its device."""
    values, scale = quantize_rows(weight)
    return (values.float() * scale[:, None]).to(weight)
