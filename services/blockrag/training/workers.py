"""One worker or many: what the training loop needs of them, so that it is the same loop.

Many workers share the weights with FSDP2 (``torch.distributed.fsdp.fully_shard``): each holds a part of every
parameter, of its gradient and of the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_CLIP = 1.0


class Workers:
    """The workers of a run, as one of them sees them: here a run of one process on one device."""

    rank = 0
    """Number of this worker; worker 0 writes."""
    size = 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def shard(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Spread the model's parameters over the workers, layer by layer."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of every worker's ``values``, in float64 on the CPU."""
        return values.detach().double().cpu()

    def barrier(self) -> None:
        """Wait until every worker came here."""


class ShardedWorkers(Workers):
    """The workers of torch.distributed's default process group, which must be running."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
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


def take_step(parameters: Sequence[nn.Parameter], rates: Sequence[tuple[optim.Optimizer, float]]) -> float:
    """Clip the gradients of ``parameters`` to a norm of 1, let each optimiser step at its learning rate, and clear.

    Gives the norm before.
    """
    norm = float(whole(nn.utils.clip_grad_norm_(parameters, _CLIP)))
    for optimizer, rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def whole(values: Tensor) -> Tensor:
    """``values`` as an ordinary tensor, put together from the workers' parts."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout of ``model`` to 0."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
