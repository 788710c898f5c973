"""What can happen to the node of a role: each fault returns when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from tests.chaos.arena import Campaign
from tests.network.machines import Machines

Fault = Callable[[Campaign[Machines], str], None]
"""What happens to the node of a role; returns when it is over."""


def cut(seconds: float) -> Fault:
    """Its link is cut for a time."""

    def strike(campaign: Campaign[Machines], role: str) -> None:
        link = campaign.arena.switch.links[campaign.arena.of_role[role].address]
        link.up = False
        time.sleep(seconds)
        link.up = True

    return strike


def cut_for_ever(campaign: Campaign[Machines], role: str) -> None:
    """Its link is cut, and its processes live on; another node takes its place."""
    campaign.arena.switch.links[campaign.arena.of_role[role].address].up = False
    campaign.arena.replace(role)


def power(campaign: Campaign[Machines], role: str) -> None:
    """Its power fails; it comes back with another address."""
    campaign.arena.of_role[role].power_off()
    campaign.arena.replace(role)


def poor(seconds: float, *, loss: float = 0.0, delay_s: float = 0.0) -> Fault:
    """Its link is slow, or loses packets, for a time."""

    def strike(campaign: Campaign[Machines], role: str) -> None:
        link = campaign.arena.switch.links[campaign.arena.of_role[role].address]
        link.loss, link.delay_s = loss, delay_s
        time.sleep(seconds)
        link.loss, link.delay_s = 0.0, 0.0

    return strike


def slow(seconds: float) -> Fault:
    """Its processes stand still every other half second, for a time."""

    def strike(campaign: Campaign[Machines], role: str) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for step in (psutil.Process.suspend, psutil.Process.resume):
                for process in campaign.arena.of_role[role].processes():
                    try:
                        step(process)
                    except psutil.NoSuchProcess:
                        continue
                time.sleep(0.5)

    return strike


FAULTS: dict[str, Fault] = {
    "cut 5 s": cut(5.0),
    "cut 30 s": cut(30.0),
    "cut for ever": cut_for_ever,
    "20 % loss": poor(10.0, loss=0.2),
    "200 ms": poor(10.0, delay_s=0.2),
    "slow node": slow(10.0),
    "another address": power,
}
