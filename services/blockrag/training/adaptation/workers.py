"""One worker or many: what the training loop needs of them, so that it is the same loop.

Many workers share the weights with FSDP2 (``torch.distributed.fsdp.fully_shard``): each holds a part of every
parameter, of its gradient and of the optimiser's state.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Workers(Protocol):
    """The workers of a run, as one of them sees them."""

    rank: int
    """Number of this worker; worker 0 writes."""
    size: int
    device: torch.device

    def shard(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Spread the model's parameters over the workers, layer by layer."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of every worker's ``values``, in float64 on the CPU."""

    def barrier(self) -> None:
        """Wait until every worker came here."""


class OneWorker:
    """A run of one process on one device."""

    rank = 0
    size = 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def shard(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Everything stays here."""

    def sum(self, values: Tensor) -> Tensor:
        return values.detach().double().cpu()

    def barrier(self) -> None:
        """Nobody to wait for."""


class ShardedWorkers:
    """The workers of torch.distributed's default process group, which must be running."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        self._mesh = init_device_mesh(device.type, (self.size,))

    def shard(self, model: nn.Module, layers: nn.ModuleList) -> None:
        for layer in layers:
            fully_shard(layer, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def barrier(self) -> None:
        dist.barrier()


def like_parameter(values: Tensor, parameter: Tensor) -> Tensor:
    """``values`` spread over the workers as ``parameter`` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    return values.to(parameter.device)


def whole(values: Tensor) -> Tensor:
    """``values`` as an ordinary tensor, put together from the workers' parts."""
    return values.full_tensor() if isinstance(values, DTensor) else values
