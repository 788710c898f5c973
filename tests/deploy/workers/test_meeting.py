"""How the ranks of the learner meet: where they listen, and what happens if they do not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
import ray
import torch.distributed as dist
from ray.util.placement_group import placement_group_table

from common.config.run import RunConfig
from common.errors import ClusterError
from deploy.workers import gang as gangs
from deploy.workers import gang_place
from deploy.workers.gang import LearnerGang
from deploy.workers.gang_place import GangPlace
from learner.zero import process_group
from learner.zero.process_group import NotMet


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    made = LearnerGang(workspace, "meeting-tests")
    yield made
    made.stop()


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def listening(pid: int) -> list[tuple[str, int]]:
    """Addresses and ports where a process listens."""
    found = psutil.Process(pid).net_connections("inet")
    return [(of.laddr.ip, of.laddr.port) for of in found if of.status == psutil.CONN_LISTEN]


def outside() -> str:
    """An address of this machine that others reach."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if name != "lo" and address.family == socket.AF_INET:
                return address.address
    pytest.skip("this machine has no address but the loopback device's")


def test_ranks_of_one_node_listen_on_the_loopback_device(gang: LearnerGang) -> None:
    """But for the port that Ray opens in each of its workers, which asks for the token."""
    worker = ray.remote(num_cpus=0)(type("Plain", (), {})).remote()
    of_ray = [host for host, _ in listening(pid_of(worker))]
    ray.kill(worker)
    for rank in gang.ranks:
        found = listening(pid_of(rank))
        assert [host for host, _ in found if host != "127.0.0.1"] == of_ray
        assert len(found) > len(of_ray), "gloo's, and rank 0's"


def test_a_stranger_reads_no_key_of_the_meeting(gang: LearnerGang) -> None:
    host = outside()
    for _, port in listening(pid_of(gang.ranks[0])):
        with pytest.raises(RuntimeError):
            dist.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False
            ).num_keys()


def test_nobody_at_the_meeting_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NotMet, match=rf"learner-1 cannot meet the others at 127\.0\.0\.1:{port}"):
        process_group.connect(
            rank=1, hosts=["127.0.0.1"] * 2, port=port, timeout_s=1.0, backend="gloo"
        )


def test_an_address_that_no_interface_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ClusterError, match=r"cannot listen at 203.*--node-ip-address"):
        process_group.listen("203.0.113.7")
    with pytest.raises(ClusterError, match=r"no network interface .*--node-ip-address"):
        process_group.connect(rank=0, hosts=["203.0.113.7"], port=1, timeout_s=1.0, backend="gloo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as a user who knows better
    with pytest.raises(NotMet):
        process_group.connect(rank=0, hosts=["203.0.113.7"], port=1, timeout_s=1.0, backend="gloo")


def test_ranks_that_do_not_meet_are_tried_again(
    workspace: RunConfig, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another port, by other processes; and not for ever."""
    gang = LearnerGang(workspace, "meets-late", start=False)
    meet, tried = LearnerGang._meet, list[list[int]]()

    def late(self: LearnerGang, meanwhile: Any) -> None:
        tried.append([pid_of(rank) for rank in self.ranks])
        if len(tried) == 1:
            raise NotMet("a link was down")
        meet(self, meanwhile)

    monkeypatch.setattr(LearnerGang, "_meet", late)
    try:
        gang.start()
        assert gang.started and len(tried) == 2
        assert not set(tried[0]) & set(tried[1])
        deadline = time.monotonic() + 10.0  # new ones may be there before the old are gone
        while any(map(psutil.pid_exists, tried[0])):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        gang.stop()

    def never(self: LearnerGang, meanwhile: Any) -> None:
        tried.append([])
        raise NotMet("the link is down")

    tried.clear()
    monkeypatch.setattr(LearnerGang, "_meet", never)
    monkeypatch.setattr(LearnerGang, "_start_ranks", lambda self: None)
    with pytest.raises(NotMet, match="the link is down"):
        gang.start()
    assert len(tried) == gangs._TRIES and not gang.started


def test_a_place_that_an_earlier_gang_left_is_freed(
    workspace: RunConfig, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a controller that asked for it when it had been declared dead; others' stay."""
    monkeypatch.setattr(gang_place, "_OTHERS_S", 0.2)
    left, other, new = (GangPlace(workspace, name) for name in ("left", "left-too", "left"))
    left.reserve(12.0)  # 24 of 32 cores: there is room for one
    other.reserve(0.5)
    try:
        new.reserve(12.0)
        there = [p["name"].split()[0] for p in placement_group_table().values()
                 if p["state"] == "CREATED"]  # fmt: skip
        assert [there.count(name) for name in ("left", "left-too")] == [1, 1]
    finally:
        new.free()
        other.free()
