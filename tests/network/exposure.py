"""What listens where in each kind of run, and what somebody without a token gets there.

``python -m tests.network.exposure`` prints the table of docs/security.md: ports are those that the
kernel lists on each machine while a run is at work, and what they answer is what a program on
another machine was told that asked for everything (`stranger`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from tests.chaos.arena import TALIPOT, Campaign, Place
from tests.network.machines import Machines, Options
from tests.network.nodes import Node, debian, until
from tests.network.run import ALONE, SPREAD
from tests.network.switch import Switch
from tests.workspaces import make_workspace

_ROOT = Path(__file__).parents[2]
_ENDLESS = {"iterations": 10_000, "checkpoint_every": 1000}
_WORKING_S = 120.0
_STRANGER = "10.77.0.99"
LISTENING = """
import json, psutil
found = []
for of in psutil.net_connections("inet"):
    if of.status == psutil.CONN_LISTEN and of.pid:
        command = " ".join(psutil.Process(of.pid).cmdline())
        found.append([command, of.laddr.ip, of.laddr.port])
print(json.dumps(found))
"""
"""Run on a machine: command line, address and port of whatever listens there."""
WHO = {
    r"gcs_server": "Ray's GCS",
    r"raylet/raylet ": "Ray's node manager and object store",
    r"ray-dashboard-|dashboard/dashboard\.py": "Ray's dashboard",
    r"dashboard/agent\.py|DashboardAgent": "Ray's agent of a node",
    r"runtime_env/agent|RuntimeEnvAgent": "Ray's agent of packages",
    r"util\.client\.server|client_server": "Ray's client server",
    r"monitor\.py": "Ray's autoscaler",
    r"ray::LearnerRank": "learner rank",
    r"ray::": "other workers",
    r"deploy\.cli watch": "`talipot watch RUN`",
    r"deploy\.cli": "`talipot train`",
}
"""By what their command lines hold, the first that fits."""
ANSWERS = {
    "metrics": "metrics: numbers, names of nodes, runs and workers",
    "GET /api/healthz 200": "whether it is well",
    "GET /api/local_raylet_healthz 200": "whether it is well",
    "GET /api/gcs_healthz 200": "whether it is well",
    "GET / 200": "the page that asks for the token",
    "GET /api/authentication_mode 200": "that there is a token",
    "its keys": "addresses of ranks, which it can change",
}
"""What is answered to somebody without a token, in words."""
FIXED = (6379, 8080, 8265, 10001, 52365)
"""Ports that do not change from run to run."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Port:
    """What ports of one kind are in one kind of run."""

    kind: str
    who: str
    port: str
    where: str
    speaks: str
    answers: tuple[str, ...]


@dataclass(slots=True)
class Scene:
    """A run at work on machines that a stranger reaches."""

    kind: str
    nodes: Sequence[Node]
    campaign: Campaign[Any]
    stranger: Node
    disturbed: list[str] = field(default_factory=list)
    """What the run had to say of workers and ranks after the stranger had been there."""

    def ports(self) -> list[Port]:
        """Look at every machine, and let the stranger ask."""
        seen = [(node, *one) for node in self.nodes for one in _listening(node)]
        reached = [[node.address, port] for node, _, host, port in seen if not _is_loopback(host)]
        program = [sys.executable, "-m", "tests.network.stranger", json.dumps(reached)]
        told = json.loads(self.stranger.say(program).splitlines()[-1])
        found = set()
        for node, command, host, port in seen:
            alone = _is_loopback(host)
            said = {} if alone else told[f"{node.address}:{port}"]
            found.add(
                Port(
                    kind=self.kind,
                    who=_who(command),
                    port=str(port) if port in FIXED else "any",
                    where="loopback" if alone else "the network",
                    speaks=said.get("speaks", ""),
                    answers=tuple(said.get("answers", ())),
                )
            )
        before = self.campaign.lines()
        until(lambda: self.campaign.lines() > before + 2, _WORKING_S, "the run does not go on")
        self.disturbed += _troubles(self.campaign)
        return sorted(found)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1")


def _listening(node: Node) -> list[tuple[str, str, int]]:
    found = json.loads(node.say([sys.executable, "-c", LISTENING]))
    return [(command, host, port) for command, host, port in found]


def _who(command: str) -> str:
    return next((who for pattern, who in WHO.items() if re.search(pattern, command)), command)


def _troubles(campaign: Campaign[Any]) -> list[str]:
    lines = (campaign.run_dir / "events.jsonl").read_text(encoding="utf8").splitlines()
    return [line for line in lines if json.loads(line)["what"] not in ("started", "health")]


class OneMachine:
    """Commands on a machine of ours that start a local cluster each."""

    address = "local"

    def __init__(self, node: Node) -> None:
        self._node = node

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there."""
        return self._node.start(command, log)


@contextmanager
def one_machine(workspace: RunConfig, folder: Path) -> Iterator[Scene]:
    """`talipot train` without an address, and `talipot watch` beside it."""
    switch = Switch(0)
    environment = {"PYTHONPATH": str(_ROOT)}
    nodes = [Node(switch, "alone", "10.77.0.1", debian, environment)]
    try:
        stranger = _stranger(switch)
        nodes.append(stranger)
        sections = {**ALONE, "train": _ENDLESS}
        sections["cluster"] = {**sections["cluster"], "dashboard": True}
        place = OneMachine(nodes[0])
        campaign: Campaign[Place] = Campaign(place, workspace, folder / "alone", **sections)
        campaign.start()
        _at_work(campaign)
        watch = [*TALIPOT, "watch", str(campaign.run_dir)]
        nodes[0].start(watch, folder / "watch.txt")
        until(lambda: b"http" in (folder / "watch.txt").read_bytes(), 30, "no page")
        yield Scene("one machine", nodes[:1], campaign, stranger)
    finally:
        for node in nodes:
            node.power_off()
        switch.close()


@contextmanager
def cluster(kind: str, options: Options, workspace: RunConfig, folder: Path) -> Iterator[Scene]:
    """A cluster with a token over several machines, with ranks on two of them."""
    machines = Machines(debian, folder / f"machines of {kind}", 0, options)
    stranger = _stranger(machines.switch)
    try:
        sections = {**SPREAD, "train": _ENDLESS}
        campaign = Campaign(machines, workspace, folder / kind, **sections)
        campaign.start()
        _at_work(campaign)
        yield Scene(kind, machines.nodes, campaign, stranger)
    finally:
        stranger.power_off()
        machines.close()


KINDS: dict[str, Callable[[RunConfig, Path], AbstractContextManager[Scene]]] = {
    "one machine": one_machine,
    "ray start": partial(cluster, "ray start", Options()),
    "KubeRay": partial(
        cluster,
        "KubeRay",
        Options(
            head=["--dashboard-host=0.0.0.0"],
            every=["--metrics-export-port=8080", "--dashboard-agent-listen-port=52365"],
        ),
    ),
}
"""A run by the kind of its cluster."""


def _stranger(switch: Switch) -> Node:
    without = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "PYTHONPATH": str(_ROOT)}
    return Node(switch, "stranger", _STRANGER, debian, without)


def _at_work(campaign: Campaign[Any]) -> None:
    try:
        until(lambda: campaign.iteration() >= 2, _WORKING_S, "the run does not begin")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {campaign.output.read_text()}") from None


def table(ports: Collection[Port]) -> str:
    """Markdown: a row for each kind of port, with the kinds of run that have it.

    Raises:
        KeyError: something was answered that `ANSWERS` does not know.
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for port in sorted(ports):
        if port.where == "loopback":
            gets = "nothing: it is not reached"
        else:
            gets = "; ".join(dict.fromkeys(ANSWERS[answer] for answer in port.answers))
        row = (port.who, port.port, port.where, port.speaks or "-", gets or "refusals")
        kinds.setdefault(row, []).append(port.kind)
    lines = [
        "| who listens | port | at | speaks | in | a stranger gets |",
        "|---|---|---|---|---|---|",
    ]
    for (who, number, where, speaks, gets), of in sorted(kinds.items()):
        chosen = ", ".join(sorted(of, key=list(KINDS).index))
        lines.append(f"| {who} | {number} | {where} | {speaks} | {chosen} | {gets} |")
    return "\n".join(lines) + "\n"


def everything() -> tuple[list[Port], list[str]]:
    """All kinds of run, and what each had to say after the stranger had been there."""
    found: list[Port] = []
    disturbed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="talipot-exposure-") as name:
        folder = Path(name)
        (folder / "workspace").mkdir()
        workspace = make_workspace(folder / "workspace")
        for of in KINDS.values():
            with of(workspace, folder) as scene:
                found += scene.ports()
                disturbed += scene.disturbed
    return found, disturbed


def main() -> None:
    """Print the table."""
    if os.geteuid():
        command = [sys.executable, "-m", "tests.network.exposure"]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", *command])
    print(table(everything()[0]))


if __name__ == "__main__":
    main()
