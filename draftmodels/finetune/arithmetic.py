"""Which type matrices are multiplied in, and looking at weights as they would be stored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from paceline.draftmodels.finetune.recipe import FinetuneRecipe
from paceline.server.config import Machine
from paceline.server.errors import ConfigError

Dtype = Literal["fp32", "bf16"]
R = TypeVar("R", bound=FinetuneRecipe)
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arithmetic(dtype: Dtype | None, device: str) -> Dtype:
    """ "fp32" or "bf16": as asked, or the faster one of this machine.

    Raises:
        ConfigError: a device that is not there.
    """
    if device == "cuda" and not Machine().cuda_available:
        raise ConfigError("device: torch sees no CUDA device; use --device cpu or a torch with CUDA")
    if dtype is not None:
        return dtype
    multiplies_bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if multiplies_bf16 else "fp32"


def decided(recipe: R) -> R:
    """The recipe with its arithmetic settled, so that a run goes on in it on every machine.

    Raises:
        ConfigError: a device that is not there.
    """
    return replace(recipe, dtype=arithmetic(recipe.dtype, recipe.device))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in ``dtype`` inside; fp32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], rounding: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Parameters with what ``rounding`` makes of them inside, exact again afterwards.

    A gradient that is made inside is one on the rounded value and is left on the exact one.
    """
    exact = {name: parameter.data for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = rounding(parameter.data)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = exact[name]
