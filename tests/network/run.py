"""``make network``: real runs over machines of their own, whose links are cut, slow and lossy.

Three machines: the head with one learner rank, one with the other rank, and one with the elastic
workers; all are namespaces of this one, connected by a switch of ours. Every run must end in the
weights of a run that nothing happened to, bit for bit, with each rollout trained once. The last
line is JSON, and the exit code 0 only where nothing was lost, doubled, unequal or hung::

    python -m tests.network.run [SEED [RUN ...]]        # all runs, or those of these names
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.chaos.arena import Campaign, Hung, Unattributed
from tests.chaos.run import DEADLINES
from tests.conftest import make_workspace
from tests.network.checker import judge
from tests.network.nodes import Hosts, Node, debian, kubernetes, unresolvable, until, why_not
from tests.network.switch import Switch

_ROOT = Path(__file__).parents[2]
_RAY = str(Path(sys.executable).with_name("ray"))
_PORT = 6379
_START_S = 60.0
SHORT, LONG = 4, 120
"""Iterations."""
SPREAD: dict[str, dict[str, object]] = {
    "learner": {**DEADLINES["learner"], "cpus_per_rank": 1.0, "labels": {"role": "gang"}},
    "rollout": {**DEADLINES["rollout"], "labels": {"role": "elastic"}},
    "reward_service": {"labels": {"role": "elastic"}},
    "cluster": DEADLINES["cluster"],
}
ALONE: dict[str, dict[str, object]] = {
    "learner": {**DEADLINES["learner"], "cpus_per_rank": 0.4},
    "rollout": {**DEADLINES["rollout"], "cpus_per_actor": 0.4},
    "reward_service": {"cpus_per_replica": 0.2},
    "cluster": DEADLINES["cluster"],
}
"""For two cores."""


class Machines:
    """A Ray cluster over nodes of ours, with a token.

    Where Ray has ended on a node whose power is on it is started again, as a service or a pod would
    be: a node that was cut off for long is declared dead, and ends when it hears of that.
    """

    def __init__(self, hosts: Hosts, folder: Path, seed: int) -> None:
        self._hosts, self._folder, self._count = hosts, folder, 0
        folder.mkdir()
        self.switch = Switch(seed)
        self._environment = {
            "PYTHONPATH": str(_ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self._nodes: list[Node] = []
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
        for node in reversed(self._nodes):
            if node.on:
                node.power_off()
        self.switch.close()

    def _node(self, role: str, cpus: int, *, head: bool = False) -> Node:
        self._count += 1
        name, address = f"{role}-{self._count}", f"10.77.0.{self._count}"
        node = Node(self.switch, name, address, self._hosts, self._environment)
        self._nodes.append(node)
        place = [f"--head --port={_PORT} --include-dashboard=false" if head
                 else f"--address={self.address}"]  # fmt: skip
        options = [
            *place[0].split(),
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


@dataclass(slots=True)
class Count:
    """What became of one kind of fault."""

    injected: int = 0
    seconds: list[float] = field(default_factory=list)
    """From its end to the end of the next iteration."""
    lost: int = 0
    doubled: int = 0
    unequal: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run and what is done to it, in this order."""

    name: str
    hosts: Hosts = debian
    iterations: int = LONG
    role: str = ""
    faults: Sequence[str] = ()
    loss: float = 0.0
    delay_s: float = 0.0
    """Of every link, from the beginning to the end."""


def plans() -> list[Plan]:
    """Every run of a session."""
    return [
        *(
            Plan(name=f"host names: {kind.__name__}", hosts=kind, iterations=SHORT)
            for kind in (debian, kubernetes, unresolvable)
        ),
        Plan(name="1 % loss and 50 ms", iterations=SHORT, loss=0.005, delay_s=0.0125),
        Plan(name="elastic node", role="elastic", faults=list(FAULTS)),
        Plan(name="gang node", role="gang", faults=list(FAULTS)),
    ]


class Session:
    """All plans; books of what happened."""

    def __init__(self, seed: int, console: Console, root: Path) -> None:
        self.rng, self.console, self.root = random.Random(seed), console, root
        self.counts = {
            name: Count() for name in (*FAULTS, *(p.name for p in plans() if not p.faults))
        }
        self.hung = 0
        self.ended: list[str] = []
        (root / "workspace").mkdir()
        self._workspace = make_workspace(root / "workspace")
        self._untroubled: dict[int, Path] = {}

    def run(self, names: Sequence[str]) -> None:
        """All plans, or those of these names, one after another."""
        if strange := set(names) - {plan.name for plan in plans()}:
            raise SystemExit(f"no such run: {', '.join(sorted(strange))}")
        for number, plan in enumerate(p for p in plans() if not names or p.name in names):
            machines = Machines(plan.hosts, self.root / f"machines-{number}", number)
            try:
                self._one(plan, machines, self.root / f"run-{number}")
            finally:
                machines.close()

    def untroubled(self, iterations: int) -> Path:
        """The folder of the same run on one machine, without a fault."""
        if iterations not in self._untroubled:
            here = Alone()
            campaign = Campaign(here, self._workspace, self.root / f"whole-{iterations}",
                                **sections(iterations, alone=True))  # fmt: skip
            campaign.start()
            campaign.finish()
            self._untroubled[iterations] = campaign.run_dir
        return self._untroubled[iterations]

    def _one(self, plan: Plan, machines: Machines, folder: Path) -> None:
        begin = time.monotonic()
        struck: list[str] = [] if plan.faults else [plan.name]
        campaign = Campaign(machines, self._workspace, folder, **sections(plan.iterations))
        for link in machines.switch.links.values():
            link.loss, link.delay_s = plan.loss, plan.delay_s
        try:
            campaign.start()
            for index, name in enumerate(plan.faults):
                target = 2 + index * (plan.iterations - 6) // len(plan.faults)
                campaign.until(lambda target=target: campaign.iteration() >= target)
                struck.append(name)
                self._strike(name, campaign, plan.role)
            campaign.finish()
            if not plan.faults:
                self.counts[plan.name].injected += 1
            batch = self._workspace.train.batch_size
            found = judge(
                campaign.run_dir,
                self.untroubled(plan.iterations),
                iterations=plan.iterations,
                batch=batch,
            )
            for name in set(struck):
                self.counts[name].lost += found.lost
                self.counts[name].doubled += found.doubled
                self.counts[name].unequal += bool(found.unequal)
            self.console.print(
                f"{plan.name}: {len(plan.faults)} faults, {found.lost} lost, {found.doubled} "
                f"doubled, weights {'UNEQUAL' if found.unequal else 'equal'}, "
                f"{time.monotonic() - begin:.0f} s",
                highlight=False,
            )
        except (Hung, Unattributed, TimeoutError) as error:
            self.hung += 1
            self.console.print(f"[red]{plan.name}[/] after {struck}: {error}", highlight=False)
        finally:
            self.ended += campaign.ended

    def _strike(self, name: str, campaign: Campaign[Machines], role: str) -> None:
        count = self.counts[name]
        count.injected += 1
        FAULTS[name](campaign, role)
        begin, before = time.monotonic(), campaign.lines()
        campaign.until(lambda: campaign.lines() > before)  # refused where the run has ended
        count.seconds.append(time.monotonic() - begin)

    def table(self) -> Table:
        """One line a fault."""
        shown = Table("fault", "injected", "recovered", "median s", "max s", "lost", "doubled")
        shown.add_column("weights")
        for name, count in self.counts.items():
            if not count.injected:
                continue
            seconds = count.seconds or [float("nan")]
            numbers = f"{median(seconds):.1f}", f"{max(seconds):.1f}"
            equal = "UNEQUAL" if count.unequal else "equal"
            cells = (count.injected, len(count.seconds), *numbers, count.lost, count.doubled, equal)
            shown.add_row(name, *map(str, cells))
        return shown

    def verdict(self) -> dict[str, Any]:
        """The last line."""
        counts = self.counts.values()
        return {
            "faults": sum(count.injected for count in counts),
            "kinds": sum(count.injected > 0 for count in counts),
            "lost": sum(count.lost for count in counts),
            "doubled": sum(count.doubled for count in counts),
            "unequal": sum(count.unequal for count in counts),
            "hung": self.hung,
            "median_recovery_s": {
                name: round(median(count.seconds), 1)
                for name, count in self.counts.items()
                if count.seconds
            },
        }


class Alone:
    """This machine, with a local cluster of each command's own."""

    address = "local"

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command here."""
        with log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, cwd=_ROOT)


def sections(iterations: int, *, alone: bool = False) -> dict[str, dict[str, object]]:
    """What the recipe of a run changes of the workspace's."""
    train = {"iterations": iterations, "checkpoint_every": 2}
    return {**(ALONE if alone else SPREAD), "train": train}


def main(arguments: Sequence[str]) -> int:
    """Run it all; the exit code."""
    if os.geteuid():  # root in a namespace of users may make networks
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", sys.executable, "-m",
                              "tests.network.run", *arguments])  # fmt: skip
    if reason := why_not():
        print(f"no machines can be made here: {reason}", file=sys.stderr)
        return 1
    seed = int(arguments[0]) if arguments else 0
    console, begin = Console(width=120), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="talipot-network-"))
    console.print(f"seed {seed}, runs in {root}", highlight=False)
    session = Session(seed, console, root)
    session.run(arguments[1:])
    console.print(session.table())
    for how in sorted(set(session.ended)):
        console.print(f"commands that ended by {how}: {session.ended.count(how)}", highlight=False)
    console.print(f"{time.monotonic() - begin:.0f} s", highlight=False)
    found = session.verdict()
    print(json.dumps(found), flush=True)
    if any(found[name] for name in ("lost", "doubled", "unequal", "hung")):
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
