"""Communication of a training on several devices: torchrun starts one process, a rank, for each."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of this process: (0, 1) outside of torch.distributed."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def average(tensors: list[Tensor]) -> None:
    """Makes each tensor its mean over all ranks, in place. All are of one type, and travel as one message."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
        t.detach().copy_(mean.view_as(t))


def copy_from_first(tensors: list[Tensor]) -> None:
    """Sets each tensor to rank 0's, in place."""
    for t in tensors:
        dist.broadcast(t.detach(), 0)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def shared(value: Any) -> Any:
    """Rank 0's value, any picklable object, on all ranks."""
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]
