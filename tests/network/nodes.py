"""Machines that are not there: namespaces of this one, with a name, an address and hosts files.

Each has its own processes, network, host name, hosts file, shared memory and temporary folder;
files elsewhere are those of this machine, as on a shared file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.network.switch import DEVICE, MTU, Switch

_START_S = 10.0

Hosts = Callable[[str, str], str]
"""The hosts file of a node by its name and address."""


def debian(name: str, address: str) -> str:
    """As Debian and Ubuntu set it up: the own name is of the loopback device."""
    return f"127.0.0.1 localhost\n127.0.1.1 {name}\n"


def kubernetes(name: str, address: str) -> str:
    """As in a pod."""
    return f"127.0.0.1 localhost\n{address} {name}\n"


def unresolvable(name: str, address: str) -> str:
    """Nothing knows the own name."""
    return "127.0.0.1 localhost\n"


def why_not() -> str:
    """Return why this machine can have no nodes; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"there is no `{program}` (Debian: util-linux, iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    tried = subprocess.run([*_NODE, "true"], capture_output=True, text=True)
    return tried.stderr.strip()


_NODE = [
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "--ipc", "--pid"),
    *("--fork", "--kill-child", "--mount-proc", "--propagation", "private"),
]
# The first process takes note of the end of orphans, as any system's does.
_SETUP = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
hostname "$1"
printf '%s' "$2" > /run/hosts; mount --bind /run/hosts /etc/hosts
echo 'hosts: files' > /run/nsswitch; mount --bind /run/nsswitch /etc/nsswitch.conf
echo ready
exec "$3" -S -c "import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execvp('sleep', ['sleep', 'infinity'])"
"""


class Node:
    """One machine, from its start until its power goes."""

    def __init__(
        self, switch: Switch, name: str, address: str, hosts: Hosts, environment: Mapping[str, str]
    ) -> None:
        self.name, self.address, self.on = name, address, True
        self._switch = switch
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "RAY_TMPDIR": "/run", "TMPDIR": "/run", **environment}
        self._machine = subprocess.Popen(
            [*_NODE, "sh", "-c", _SETUP, "sh", name, hosts(name, address), sys.executable],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._machine.stdout is not None
        if self._machine.stdout.readline() != b"ready\n":
            raise PermissionError(f"{name} cannot be made: {why_not()}")
        (init,) = psutil.Process(self._machine.pid).children()
        self._init = init.pid
        switch.connect(address, init.pid)
        for line in (
            f"ip address add {address}/24 dev {DEVICE}",
            f"ip link set {DEVICE} mtu {MTU} up",
            "ip link set lo up",
        ):
            subprocess.run([*self.inside, *line.split()], check=True)

    @property
    def inside(self) -> list[str]:
        """What a command begins with that is run on this machine."""
        kinds = ("--user", "--net", "--mount", "--uts", "--ipc", "--pid")
        return ["nsenter", f"--target={self._init}", *kinds, "--preserve-credentials"]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on this machine."""
        with log.open("ab") as file:
            started = subprocess.Popen(
                [*self.inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment,
            )
        self._started.append(started)
        return started

    def say(self, command: Sequence[str]) -> str:
        """Return what a command on this machine prints."""
        done = subprocess.run(
            [*self.inside, *command], capture_output=True, text=True, env=self._environment
        )
        return done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        """All that runs on it, but its first; many have parents that are not of it."""
        here, found = os.readlink(f"/proc/{self._init}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == here and process.pid != self._init:
                    found.append(process)
        return found

    def power_off(self) -> None:
        """Kill every process of this machine at once."""
        self.on = False
        os.kill(self._init, signal.SIGKILL)
        for process in self._started:  # the first one ends once all others are taken note of
            process.kill()  # nsenter, which stops where what it started is stopped
            process.wait(_START_S)
        self._machine.wait(_START_S)
        self._switch.disconnect(self.address)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something. Raises TimeoutError where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)
