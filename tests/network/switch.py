"""A switch between machines that are not there: what they send passes through this process.

A node is a network namespace with one TUN device. Of each packet that leaves it, this process
decides what becomes of it: it arrives now, later or never. So links are cut, delayed and lossy by a
seeded draw, without the kernel's help (netem), which many machines do not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
DEVICE = "eth0"
MTU = 1500
"""As on real networks: what is lost is a packet, not a whole message."""
_AT_ONCE = 256
"""Packets that are taken from one node before others have their turn."""
_IDLE_S = 0.1


@dataclass(slots=True)
class Link:
    """How a node is connected to the switch; each packet passes two."""

    up: bool = True
    delay_s: float = 0.0
    loss: float = 0.0
    """Share of its packets that are lost, in each direction."""


class Switch:
    """All links, and a thread that carries packets between them."""

    def __init__(self, seed: int) -> None:
        self.links: dict[str, Link] = {}
        self.carried = self.lost = 0
        self._rng = random.Random(seed)
        self._devices: dict[str, int] = {}
        self._of: dict[int, str] = {}
        self._later: list[tuple[float, int, str, bytes]] = []
        self._count = 0
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="switch", daemon=True)
        self._thread.start()

    def connect(self, address: str, process: int) -> None:
        """Give the namespace of a process a device, which `ip` must set up yet.

        Raises:
            PermissionError: this process may not.
        """
        device = _device(process)
        with self._lock:
            self.links[address] = Link()
            self._devices[address], self._of[device] = device, address
            self._poll.register(device, select.EPOLLIN)

    def disconnect(self, address: str) -> None:
        """Forget a node that is gone."""
        with self._lock:
            device = self._devices.pop(address)
            del self._of[device], self.links[address]
            self._poll.unregister(device)
            os.close(device)

    def close(self) -> None:
        """End the thread, and all links."""
        self._ended.set()
        self._thread.join()
        for address in list(self._devices):
            self.disconnect(address)
        self._poll.close()

    def _carry(self) -> None:
        while not self._ended.is_set():
            wait = self._later[0][0] - time.monotonic() if self._later else _IDLE_S
            ready = self._poll.poll(max(0.0, min(wait, _IDLE_S)))
            with self._lock:
                for device, _ in ready:
                    if device in self._of:
                        for packet in _packets(device):
                            self._take(self._of[device], packet)
                while self._later and self._later[0][0] <= time.monotonic():
                    _, _, to, packet = heapq.heappop(self._later)
                    self._give(to, packet)

    def _take(self, source: str, packet: bytes) -> None:
        to = ".".join(map(str, packet[16:20])) if packet[0] >> 4 == 4 else ""
        if to not in self.links:
            return
        ends = self.links[source], self.links[to]
        if not all(link.up and self._rng.random() >= link.loss for link in ends):
            self.lost += 1
            return
        delay = sum(link.delay_s for link in ends)
        if delay or self._later:
            self._count += 1  # packets of one time stay in their order
            heapq.heappush(self._later, (time.monotonic() + delay, self._count, to, packet))
        else:
            self._give(to, packet)

    def _give(self, to: str, packet: bytes) -> None:
        if to in self._devices and self.links[to].up:
            with contextlib.suppress(OSError):  # its namespace is going
                os.write(self._devices[to], packet)
                self.carried += 1


def _packets(device: int) -> Iterator[bytes]:
    for _ in range(_AT_ONCE):
        try:
            yield os.read(device, MTU + 100)
        except OSError:  # none is left, or its namespace is going
            return


def _device(process: int) -> int:
    """Open a TUN device in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(namespace: int) -> None:
        if libc.setns(namespace, _CLONE_NEWNET):
            raise PermissionError(ctypes.get_errno(), "a network namespace cannot be entered")

    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
    try:
        enter(there)
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        finally:
            enter(here)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        return device
    finally:
        os.close(here)
        os.close(there)
