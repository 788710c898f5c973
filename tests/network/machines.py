"""Where runs of a session are: a Ray cluster over nodes of ours, or this machine alone."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.network.nodes import Hosts, Node, until
from tests.network.switch import Switch

_ROOT = Path(__file__).parents[2]
_RAY = str(Path(sys.executable).with_name("ray"))
_PORT = 6379
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `ray start`, beside those that make the cluster."""

    head: Sequence[str] = ()
    every: Sequence[str] = ()


WITHOUT_DASHBOARD = Options(head=["--include-dashboard=false"])


class Machines:
    """A Ray cluster over nodes of ours, with a token.

    Where Ray has ended on a node whose power is on it is started again, as a service or a pod would
    be: a node that was cut off for long is declared dead, and ends when it hears of that.
    """

    def __init__(
        self, hosts: Hosts, folder: Path, seed: int, options: Options = WITHOUT_DASHBOARD
    ) -> None:
        self._hosts, self._folder, self._count, self._options = hosts, folder, 0, options
        folder.mkdir()
        self.switch = Switch(seed)
        self._environment = {
            "PYTHONPATH": str(_ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.nodes: list[Node] = []
        self._rays: dict[str, tuple[Node, list[str], subprocess.Popen[bytes]]] = {}
        self.head = self._node("gang", 1, head=True)
        self.of_role = {"gang": self._node("gang", 1), "elastic": self._node("elastic", 2)}
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    @property
    def address(self) -> str:
        """The cluster's."""
        return f"{self.head.address}:{_PORT}"

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on the head."""
        return self.head.start(command, log)

    def replace(self, role: str) -> None:
        """Let another machine, of another address, join in a role."""
        self.of_role[role] = self._node(role, 1 if role == "gang" else 2)

    def close(self) -> None:
        """Switch all machines off."""
        self._ended.set()
        self._keeper.join()
        for node in reversed(self.nodes):
            if node.on:
                node.power_off()
        self.switch.close()

    def _node(self, role: str, cpus: int, *, head: bool = False) -> Node:
        self._count += 1
        name, address = f"{role}-{self._count}", f"10.77.0.{self._count}"
        node = Node(self.switch, name, address, self._hosts, self._environment)
        self.nodes.append(node)
        begins = ["--head", f"--port={_PORT}", *self._options.head]
        options = [
            *(begins if head else [f"--address={self.address}"]),
            *self._options.every,
            f"--node-ip-address={address}",
            f"--num-cpus={cpus}",
            f"--labels=role={role}",
            f"--object-store-memory={100 * 2**20}",
            "--disable-usage-stats",
            "--block",
        ]
        log = self._folder / f"{name}.txt"
        command = [sys.executable, _RAY, "start", *options]
        joining = node.start(command, log)
        until(
            lambda: joining.poll() is not None or b"Ray runtime started" in log.read_bytes(),
            _START_S,
            f"{name} does not join; see {log}",
        )
        if joining.poll() is not None:
            raise TimeoutError(f"{name} has ended; see {log}")
        self._rays[name] = (node, command, joining)
        return node

    def _keep(self) -> None:
        while not self._ended.wait(1.0):
            for name, (node, command, ray) in list(self._rays.items()):
                reached = node.on and self.switch.links[node.address].up
                if reached and node is not self.head and ray.poll() is not None:
                    again = node.start(command, self._folder / f"{name}.txt")
                    self._rays[name] = (node, command, again)


class Alone:
    """This machine, with a local cluster of each command's own."""

    address = "local"

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command here."""
        with log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, cwd=_ROOT)
