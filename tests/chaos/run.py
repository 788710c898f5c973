"""``make chaos``: faults by a seeded schedule upon real runs; a table, and a verdict.

Every run but the asynchronous one must end in the weights, bit for bit, of a run that nothing
happened to. The asynchronous one has no such twin: its log, trained again, must end in its weights.

The last line is JSON, and the exit code 0 only when nothing was lost, doubled, unequal or hung::

    python -m tests.chaos.run [SEED [RUN ...]]          # all runs, or those of these names
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.config.run import RunConfig
from tests.chaos.arena import Arena, Campaign, Hung, Unattributed, small_disk
from tests.chaos.books import Books, wrong
from tests.chaos.faults import (
    Fault,
    corrupted_checkpoint,
    corrupted_slice,
    driver,
    full_disk,
    hung,
    in_the_midst_of,
    killed,
    node,
    slow,
)
from tests.chat_runs import make_chat_workspace
from tests.workspaces import make_workspace

DEADLINES: dict[str, dict[str, object]] = {
    "learner": {"deadline_s": 30, "max_restarts": 20},
    "rollout": {"lease_deadline_s": 8},
    "cluster": {"dashboard": False, "start_timeout_s": 60, "max_restarts": 20},
}
CHOSEN: dict[str, dict[str, object]] = {
    "data": {
        "mixture": {"prompts": {"limit": 40}},
        "curriculum": {"solved": 0.5, "after": 8, "back_after": 6},
    },
    "train": {
        "algorithm": "grpo",
        "ppg": None,
        "prompts_per_iteration": 4,
        "samples_per_prompt": 4,
        "dynamic_sampling": 2,
    },
    "evaluate": {"every": 3, "prompts": 6, "samples": 2, "solved": 0.5, "greedy": True},
    "reward_service": {
        "components": {
            "n": {
                "kind": "function",
                "target": "tests.rewards:a_tenth_is_given_up",
                "isolation": "process",
            }
        }
    },
}
"""Dynamic sampling, a curriculum, evaluation while training, and a tenth of the responses without a
score: what decides which rollouts are issued, trained and dropped."""
FAULTS: dict[str, Fault] = {
    "rollout actor killed": killed("rollout"),
    "reward worker killed": killed("reward"),
    "learner rank killed": killed("learner"),
    "learner rank killed in a policy phase": in_the_midst_of("a policy phase", "learner"),
    "learner rank killed in an auxiliary phase": in_the_midst_of("an auxiliary phase", "learner"),
    "learner rank killed in a checkpoint's write": in_the_midst_of(
        "a checkpoint's write", "learner"
    ),
    "controller killed": killed("controller"),
    "controller killed in an auxiliary phase": in_the_midst_of("an auxiliary phase", "controller"),
    "controller killed in a checkpoint's write": in_the_midst_of(
        "a checkpoint's write", "controller"
    ),
    "driver killed": driver,
    "node killed": node,
    "rollout actor hangs": hung("rollout"),
    "reward worker hangs": hung("reward"),
    "learner rank hangs": hung("learner"),
    "rollout actor slow": slow("rollout"),
    "reward worker slow": slow("reward"),
    "slice of weights corrupted": corrupted_slice,
    "checkpoint corrupted": corrupted_checkpoint,
    "disk full": full_disk,
}
POINTS = [
    "learner rank killed in a policy phase",
    "controller killed in an auxiliary phase",
    "learner rank killed in a checkpoint's write",
    "driver killed",
    "controller killed in a checkpoint's write",
]
"""Seeded points at which any of the three is killed, for every ZeRO stage (invariant I4)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run and what is done to it, in this order."""

    name: str
    faults: Sequence[str]
    sections: dict[str, dict[str, object]]
    iterations: int
    """Enough that every fault strikes before the end."""
    alone: bool = False
    """Equal to its own replay, not to a run that nothing happened to."""
    workspace: Callable[[Path], RunConfig] = make_workspace
    """What it is a run of."""


def plans() -> list[Plan]:
    """Every run of a session."""
    elastic = [
        *("rollout actor killed", "reward worker killed", "slice of weights corrupted"),
        *("rollout actor hangs", "rollout actor slow", "reward worker killed"),
        *("rollout actor killed", "reward worker slow", "slice of weights corrupted"),
        *("reward worker hangs", "rollout actor killed"),
    ]
    harsh = [
        *("node killed", "disk full", "checkpoint corrupted", "learner rank hangs"),
        *("node killed", "disk full", "checkpoint corrupted"),
    ]
    adapted = [*POINTS, "rollout actor killed", "slice of weights corrupted"]
    instruct = [
        *(*POINTS, "rollout actor killed", "reward worker killed", "slice of weights corrupted"),
        *("rollout actor hangs", "checkpoint corrupted", "learner rank hangs"),
    ]
    everything = [
        *("rollout actor killed", "learner rank killed", "reward worker killed"),
        *("controller killed", "learner rank killed in an auxiliary phase", "driver killed"),
    ]
    chosen = [
        *("learner rank killed in a policy phase", "rollout actor killed", "driver killed"),
        *("learner rank killed in a checkpoint's write", "reward worker killed"),
        *("controller killed in a checkpoint's write", "controller killed"),
    ]
    return [
        Plan("elastic workers", elastic, {}, 120),
        Plan("nodes, disks, checkpoints", harsh, {}, 120),
        Plan("asynchronous", everything, {"train": {"max_staleness": 2}}, 100, alone=True),
        *(
            Plan(f"ZeRO {stage}", POINTS, {"learner": {"zero_stage": stage}}, 40)
            for stage in (1, 2, 3)
        ),
        Plan("LoRA", adapted, {"train": {"lora": {"rank": 4}}, "learner": {"zero_stage": 3}}, 60),
        Plan("rewards that choose", chosen, CHOSEN, 60),
        Plan("instruct", instruct, {}, 60, workspace=make_chat_workspace),
    ]


class Session:
    """One round of all plans; books of what happened."""

    def __init__(self, seed: int, console: Console) -> None:
        self.rng = random.Random(seed)
        self.console = console
        self.books = Books(FAULTS)
        self._hashes: dict[str, str] = {}
        self._workspaces: dict[Callable[[Path], RunConfig], RunConfig] = {}

    def run(self, arena: Arena, root: Path, names: Sequence[str]) -> None:
        """All plans, or those of these names, one after another."""
        for number, plan in enumerate(p for p in plans() if not names or p.name in names):
            with ExitStack() as stack:
                disk = root / f"disk-{number}"
                if "disk full" in plan.faults:
                    stack.enter_context(small_disk(disk, 64))
                workspace = self._workspace(root, plan)
                campaign = Campaign(arena, workspace, disk, **_sections(plan))
                whole = "" if plan.alone else self._undisturbed(arena, workspace, root, plan)
                self._one(plan, campaign, whole)

    def _workspace(self, root: Path, plan: Plan) -> RunConfig:
        if plan.workspace not in self._workspaces:
            folder = root / f"workspace-{len(self._workspaces)}"
            folder.mkdir()
            self._workspaces[plan.workspace] = plan.workspace(folder)
        return self._workspaces[plan.workspace]

    def _undisturbed(self, arena: Arena, workspace: RunConfig, root: Path, plan: Plan) -> str:
        """The weights' hash of the same run without a fault."""
        key = f"{workspace.output} {plan.sections} {plan.iterations}"
        if key not in self._hashes:
            folder = root / f"whole-{len(self._hashes)}"
            campaign = Campaign(arena, workspace, folder, **_sections(plan))
            campaign.start()
            self._hashes[key] = campaign.finish()["weights_hash"]
        return self._hashes[key]

    def _one(self, plan: Plan, campaign: Campaign[Arena], whole: str) -> None:
        begin = time.monotonic()
        struck: list[str] = []
        try:
            campaign.start()
            for index, name in enumerate(plan.faults):
                # Spread over the run, so that every fault meets a run that has recovered.
                target = (
                    2 + index * (plan.iterations - 8) // len(plan.faults) + self.rng.randrange(3)
                )
                campaign.until(lambda target=target: campaign.iteration() >= target)
                struck.append(name)
                self._strike(name, campaign)
            facts = campaign.finish()
            equal = campaign.replayed() if plan.alone else facts["weights_hash"] == whole
            lost, doubled = campaign.accounts(facts)
            self.books.enter(struck, lost=lost, doubled=doubled, equal=equal)
            self.console.print(
                f"{plan.name}: {len(struck)} faults, {lost} lost, {doubled} doubled, "
                f"weights {'equal' if equal else 'UNEQUAL'}, {time.monotonic() - begin:.0f} s",
                highlight=False,
            )
        except (Hung, Unattributed, AssertionError, LookupError) as error:
            self.books.hung += 1
            self.console.print(f"[red]{plan.name}[/] after {struck}: {error}", highlight=False)
            campaign.process.kill()
            raise
        finally:
            self.books.ended += campaign.ended

    def _strike(self, name: str, campaign: Campaign[Arena]) -> None:
        count = self.books.counts[name]
        count.injected += 1
        FAULTS[name](campaign, self.rng)
        begin, before = time.monotonic(), campaign.lines()
        campaign.until(lambda: campaign.lines() > before or campaign.process.poll() == 0)
        count.seconds.append(time.monotonic() - begin)


def _sections(plan: Plan) -> dict[str, dict[str, object]]:
    train: dict[str, object] = {"iterations": plan.iterations, "checkpoint_every": 2}
    made = {**DEADLINES, "train": train}
    return made | {name: {**made.get(name, {}), **own} for name, own in plan.sections.items()}


def main(arguments: Sequence[str]) -> int:
    """Run it all; the exit code."""
    seed = int(arguments[0]) if arguments else 0
    console = Console(width=120)
    root = Path(tempfile.mkdtemp(prefix="talipot-chaos-"))
    session, begin = Session(seed, console), time.monotonic()
    console.print(f"seed {seed}, runs in {root}", highlight=False)
    arena = Arena()
    whole = False
    try:
        session.run(arena, root, arguments[1:])
        whole = True
    except (Hung, Unattributed, AssertionError, LookupError) as error:
        console.print(f"ended early: {error}", highlight=False)
    finally:
        arena.close()
    session.books.tell(console)
    console.print(f"{time.monotonic() - begin:.0f} s", highlight=False)
    found = session.books.verdict()
    print(json.dumps(found), flush=True)
    if whole and not wrong(found):
        shutil.rmtree(root)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
