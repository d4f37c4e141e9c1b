"""Weights, and what trains of them with gradients, moments and averages, shared out over the processes: torch's FSDP2.

Each block of a network is a unit, whose weights are gathered when it runs and let go behind it, and the rest of the network is
one, whose weights stay until `let_go`: they must not change before. They stay in the backward pass too: of a forward pass that
was cut short, where features are read, FSDP sees no end at which it would gather them again. Of a tensor that is shared out
every process has a part (a DTensor); what asks for the whole must do so in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.errors import RecipeError
from .recipe import Fit


def check_sharding(fit: Fit, processes: int) -> None:
    """Raises RecipeError for what cannot be shared out."""
    if fit.optimizer != "adamw":
        raise RecipeError(f"--shard needs fit.optimizer: adamw; {fit.optimizer} reads whole weights")
    if processes < 2:
        raise RecipeError(
            "--shard shares student and teacher out over several processes, and there is one; start more: "
            "accelerate launch --num_processes 2 -m imagine_flash distill ... --shard"
        )


def shard(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Share out these networks, in place, over all processes."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks:
        for part in (*_blocks(network), network):
            fully_shard(part, mesh=mesh)
        cast(FSDPModule, network).set_reshard_after_backward(False, recurse=False)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of its lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def let_go(module: nn.Module) -> None:
    """Every process keeps its part alone, also of what ran forwards only."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def average_rest(module: nn.Module, accelerator: Any) -> None:
    """The gradients of weights that are not shared out, averaged over the processes."""
    for weight in module.parameters():
        if weight.grad is not None and not isinstance(weight.grad, DTensor):
            weight.grad = accelerator.reduce(weight.grad, "mean")


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What this process has of a whole tensor, where `own` is shared out."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def agreed(value: float, device: torch.device) -> float:
    """What the first process says."""
    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=device)))  # type: ignore[arg-type]


def gather(module: nn.Module) -> None:
    """Every weight whole again, in every process; the module is to be read, and trains no more."""
    let_go(module)
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if isinstance(weight, DTensor):
                part._parameters[name] = nn.Parameter(whole(weight.detach()), requires_grad=weight.requires_grad)
