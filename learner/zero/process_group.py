"""The process group of the learner gang: meeting, and sums over its ranks.

Rank 0 listens for the others, and every rank for its peers (gloo, and NCCL between GPUs), each at
the one address of its node that it is given, and nowhere else: torch left alone listens on all
addresses, and finds its own by the name of the host, which Debian resolves to 127.0.1.1. None asks
for a password, so ranks of one node meet on the loopback device.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import psutil
import torch.distributed as dist
from torch import Tensor

from common.errors import ClusterError
from common.files import one_line

_MEET_S = 60.0
"""Longest wait for another rank to come; all were there a moment before."""


class NotMet(ClusterError):
    """Ranks could not reach each other; new ones, at other ports, may."""


def listen(host: str) -> socket.socket:
    """Listen where the others will meet this rank: at a free port of one address.

    Args:
        host: address of this node.

    Raises:
        ClusterError: the node has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ClusterError(
            f"learner-0 cannot listen at {host}, by which Ray knows its node: {one_line(error)}; "
            "start that with `ray start --node-ip-address` and an address that it has"
        ) from None


def connect(
    *,
    rank: int,
    hosts: Sequence[str],
    port: int,
    timeout_s: float,
    backend: str,
    listener: socket.socket | None = None,
) -> None:
    """Join the process group; returns once all ranks have.

    Args:
        rank: this process's number, from 0.
        hosts: addresses of the ranks' nodes, by rank, as the others reach them.
        port: where rank 0 listens.
        timeout_s: longest wait for the others in every collective.
        backend: what carries collectives, as torch names it (`Compute.collectives`).
        listener: rank 0's; it is taken over.

    Raises:
        NotMet: another rank cannot be reached.
        ClusterError: this node has no such address.
    """
    world, meeting = len(hosts), f"{hosts[0]}:{port}"
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(port),
    }
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = _interface_of(hosts[rank])
    if "nccl" in backend:  # which takes a name for the beginning of several, but for this sign
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=" + _interface_of(hosts[rank]))
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and not exported
            hosts[0],
            port,
            world,
            is_master=listener is not None,
            timeout=min(timeout / 2, timedelta(seconds=_MEET_S)),
            master_listen_fd=None if listener is None else listener.detach(),
        )
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:  # torch's own of the network, and gloo's, which has no type
        raise NotMet(
            f"learner-{rank} cannot meet the others at {meeting}: {one_line(error)}; "
            "check that the nodes of the learner reach each other at all ports"
        ) from None


def _interface_of(host: str) -> str:
    """Return the name of the network interface that has an address.

    Raises:
        ClusterError: none has.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            return str(name)
    raise ClusterError(
        f"no network interface of host {socket.gethostname()} has the address {host}, by which Ray "
        "knows it; start its node with `ray start --node-ip-address` and one that it has"
    )


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
