"""The processes of a data-parallel job, as torchrun starts them; one process is the case of one rank.

Every rank holds the whole model and its own teacher. Batches are the same whatever the number of ranks: each rank
trains the sequences of a batch whose number is its own modulo the number of ranks, and gradients are summed.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """``rank`` of ``world`` processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun's variables say (WORLD_SIZE and so on); joins the process group (gloo) if there are several."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return cls(dist.get_rank(), world)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, generates and measures."""
        return self.rank == 0

    def mine(self, indices: Sequence[int]) -> list[int]:
        """Those of a batch's sequences that this rank trains."""
        return [index for index in indices if index % self.world == self.rank]

    def from_main(self, value: T) -> T:
        """What the main rank has; others pass anything."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all ranks; missing ones count as zero."""
        if self.world == 1:
            return
        owners = list(parameters)
        for parameter in owners:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in owners if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


#: A job of one process.
ONE_RANK = Ranks()
