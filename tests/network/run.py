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
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.chaos.arena import Campaign, Hung, Unattributed
from tests.chaos.books import Books, wrong
from tests.chaos.run import DEADLINES
from tests.network.checker import judge
from tests.network.faults import FAULTS
from tests.network.machines import Alone, Machines
from tests.network.nodes import Hosts, debian, kubernetes, unresolvable, why_not
from tests.workspaces import make_workspace

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
        self.seed, self.console, self.root = seed, console, root
        self.books = Books([*FAULTS, *(plan.name for plan in plans() if not plan.faults)])
        (root / "workspace").mkdir()
        self._workspace = make_workspace(root / "workspace")
        self._untroubled: dict[int, Path] = {}

    def run(self, names: Sequence[str]) -> None:
        """All plans, or those of these names, one after another."""
        if strange := set(names) - {plan.name for plan in plans()}:
            raise SystemExit(f"no such run: {', '.join(sorted(strange))}")
        for number, plan in enumerate(p for p in plans() if not names or p.name in names):
            machines = Machines(plan.hosts, self.root / f"machines-{number}", self.seed)
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
                self.books.counts[plan.name].injected += 1
            found = judge(
                campaign.run_dir,
                self.untroubled(plan.iterations),
                iterations=plan.iterations,
                batch=self._workspace.train.batch_size,
            )
            self.books.enter(
                struck, lost=found.lost, doubled=found.doubled, equal=not found.unequal
            )
            self.console.print(
                f"{plan.name}: {len(plan.faults)} faults, {found.lost} lost, {found.doubled} "
                f"doubled, weights {'UNEQUAL' if found.unequal else 'equal'}, "
                f"{time.monotonic() - begin:.0f} s",
                highlight=False,
            )
        except (Hung, Unattributed, TimeoutError) as error:
            self.books.hung += 1
            self.console.print(f"[red]{plan.name}[/] after {struck}: {error}", highlight=False)
        finally:
            self.books.ended += campaign.ended

    def _strike(self, name: str, campaign: Campaign[Machines], role: str) -> None:
        count = self.books.counts[name]
        count.injected += 1
        FAULTS[name](campaign, role)
        begin, before = time.monotonic(), campaign.lines()
        campaign.until(lambda: campaign.lines() > before)  # refused where the run has ended
        count.seconds.append(time.monotonic() - begin)


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
    session.books.tell(console)
    console.print(f"{time.monotonic() - begin:.0f} s", highlight=False)
    found = session.books.verdict() | {"median_recovery_s": session.books.medians()}
    print(json.dumps(found), flush=True)
    if wrong(found):
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
