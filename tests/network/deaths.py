"""One machine on which commands die: what is killed midway, and how the command is given again.

The machine is a namespace, so that all of its processes may be listed, killed at once, and found
gone; runs lie on a file system that outlives it.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.network.nodes import Node, debian, until
from tests.network.switch import Switch

_ROOT = Path(__file__).parents[2]
_TALIPOT = [sys.executable, "-m", "deploy.cli"]
LONGEST_S = 240.0
"""Of a command, from its start to its end."""
_GONE_S = 30.0
_OURS = r"ray::(LearnerRank|RolloutActor|RewardWorker|ControllerActor)|deploy\.cli"
VICTIMS = {
    "driver": r"-m deploy\.cli ",
    "rank": r"ray::LearnerRank",
    "worker": r"ray::(RolloutActor|RewardWorker)",
    "raylet": r"raylet/raylet ",
    "GCS": r"gcs/gcs_server ",
}
"""Command lines of what is killed alone."""


@dataclass(slots=True)
class Machine:
    """A machine that may be switched off and on again."""

    folder: Path
    environment: Mapping[str, str]
    node: Node = field(init=False)
    log: Path = field(init=False)
    _switch: Switch = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self._switch, self.log = Switch(0), self.folder / "said.txt"
        self._on()

    def _on(self) -> None:
        self._count += 1
        address = f"10.77.0.{self._count}"
        environment = {"PYTHONPATH": str(_ROOT), **self.environment}
        self.node = Node(self._switch, "alone", address, debian, environment)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a `talipot` command; what it says is appended to the log."""
        self.log.write_text("", encoding="utf8")
        return self.node.start([*_TALIPOT, *arguments], self.log)

    def end(self, started: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Wait for a command's end; its exit code and what it said."""
        code = started.wait(LONGEST_S)
        return code, self.log.read_text(encoding="utf8")

    def kill(self, victim: str) -> None:
        """Kill what is called so, or everything at once, with the power back on after that."""
        if victim == "power":
            self.node.power_off()
            self._on()
            return
        found = [p for p in self.node.processes() if re.search(VICTIMS[victim], command_of(p))]
        assert found, f"no {victim} among {sorted(map(command_of, self.node.processes()))}"
        for process in found:
            process.send_signal(signal.SIGKILL)

    def deserted(self) -> None:
        """Wait until nothing of ours runs here any more; agents of Ray's may, for a minute.

        Raises:
            TimeoutError: something stays.
        """

        def left() -> list[str]:
            return [c for c in map(command_of, self.node.processes()) if re.search(_OURS, c)]

        try:
            until(lambda: not left(), _GONE_S, "left behind")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {left()}") from None

    def read_only(self, folder: Path) -> None:
        """Let nobody here write into a folder."""
        self._mount(folder, "mount --bind {0} {0} && mount -o remount,ro,bind {0}")

    def writable(self, folder: Path) -> None:
        """Take that back."""
        self._mount(folder, "umount --lazy {0}")

    def _mount(self, folder: Path, command: str) -> None:
        said = self.node.say(["sh", "-c", command.format(folder)])
        assert said == "", said

    def close(self) -> None:
        """Switch it off for good."""
        if self.node.on:
            self.node.power_off()
        self._switch.close()


def command_of(process: psutil.Process) -> str:
    """Its command line; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def wait_for(condition: Callable[[], bool], started: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a command is midway. Raises AssertionError where it ends before."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert started.poll() is None, log.read_text(encoding="utf8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf8")
        time.sleep(0.02)


def removed(folder: Path) -> None:
    """Remove a folder that somebody may be writing into."""
    deadline = time.monotonic() + 10
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        assert time.monotonic() < deadline
