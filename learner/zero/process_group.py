"""The process group of the learner gang: joining it, and sums over its ranks."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ClusterError
from common.files import one_line


def connect(
    *, rank: int, world: int, address: str, port: int, timeout_s: float, backend: str
) -> None:
    """Join the process group; returns once all ranks have.

    Args:
        rank: this process's number, from 0.
        world: ranks in all.
        address: where rank 0 listens.
        port: its port.
        timeout_s: longest wait for the others, now and in every collective.
        backend: what carries collectives, as torch names it (`Compute.collectives`).

    Raises:
        ClusterError: the address is taken or cannot be reached.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    try:
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except dist.DistNetworkError as error:
        raise ClusterError(
            f"learner-{rank} cannot meet the others at {address}:{port}: "
            f"{one_line(error)}; free the port or start again, which picks another"
        ) from None


def disconnect() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str:
    """Return what carries collectives."""
    return dist.get_backend()


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size()


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor of any shape over ranks, in place; returns it."""
    dist.all_reduce(tensor)
    return tensor


def all_sums(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sum numbers over ranks in float64; every rank has the same names in the same order."""
    total = all_sum(torch.tensor(list(numbers.values()), dtype=torch.float64))
    return dict(zip(numbers, total.tolist(), strict=True))
