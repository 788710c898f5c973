"""What can go wrong: each fault is done to a run at work and returns when it has struck."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from learner.learner import Learner
from learner.zero.engine import ZeroEngine
from tests.chaos.arena import Arena, Campaign

Fault = Callable[[Campaign[Arena], random.Random], None]

TITLES = {
    "rollout": "RolloutActor",
    "reward": "RewardWorker",
    "learner": "LearnerRank",
    "controller": "ControllerActor",
}


def pick(campaign: Campaign[Arena], kind: str, rng: random.Random) -> psutil.Process:
    """A process of this kind, as soon as there is one."""
    campaign.until(lambda: bool(campaign.arena.processes(TITLES[kind])))
    return rng.choice(campaign.arena.processes(TITLES[kind]))


def killed(kind: str) -> Fault:
    """SIGKILL a worker's process at whatever it does."""

    def strike(campaign: Campaign[Arena], rng: random.Random) -> None:
        pick(campaign, kind, rng).kill()

    return strike


def driver(campaign: Campaign[Arena], rng: random.Random) -> None:
    """SIGKILL the command; the run goes on, and the next command attaches to it."""
    campaign.process.kill()
    campaign.process.wait()


def hung(kind: str) -> Fault:
    """SIGSTOP for ever: found by a deadline, ended and replaced."""

    def strike(campaign: Campaign[Arena], rng: random.Random) -> None:
        victim = pick(campaign, kind, rng)
        victim.suspend()
        campaign.until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)

    return strike


def slow(kind: str) -> Fault:
    """SIGSTOP for a second, under every deadline: nobody may be replaced for that."""

    def strike(campaign: Campaign[Arena], rng: random.Random) -> None:
        victim = pick(campaign, kind, rng)
        victim.suspend()
        time.sleep(1.0)
        victim.resume()
        before = campaign.lines()
        campaign.until(lambda: campaign.lines() > before)
        if not victim.is_running():
            raise AssertionError(f"{kind} {victim.pid} was only slow, and was replaced")

    return strike


def node(campaign: Campaign[Arena], rng: random.Random) -> None:
    """SIGKILL a raylet, and with it all workers of its node; another node joins later."""
    arena = campaign.arena
    nodes = sorted(arena.cluster.worker_nodes, key=lambda node: str(node.unique_id))
    lost = rng.choice(nodes)
    arena.cluster.remove_node(lost, allow_graceful=False)
    arena.add_node()


def corrupted_slice(campaign: Campaign[Arena], rng: random.Random) -> None:
    """Flip a byte of the next weights that one actor receives."""
    before = campaign.lines()
    campaign.arena.ask(r"run:rollout-\d+", _flip, rng.randrange(1000))
    campaign.until(lambda: campaign.lines() > before)


def _flip(actor: Any, place: int) -> None:
    load = actor.generator.buffer.load

    def flipped(manifest: Any, payloads: Any) -> str:
        actor.generator.buffer.load = load
        damaged = [part.copy() for part in payloads[0]]
        whole = max(range(len(damaged)), key=lambda i: damaged[i].nbytes)
        damaged[whole][place % damaged[whole].nbytes] ^= 1
        found: str = load(manifest, [damaged, *payloads[1:]])
        return found

    actor.generator.buffer.load = flipped


def corrupted_checkpoint(campaign: Campaign[Arena], rng: random.Random) -> None:
    """Damage the newest checkpoint, then SIGKILL the controller, so that it is wanted."""
    folder = campaign.run_dir / "checkpoints"
    campaign.until(lambda: len(list(folder.glob("step-??????"))) > 1)
    newest = sorted(folder.glob("step-??????"))[-1]
    victim = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1
    victim.write_bytes(data)
    pick(campaign, "controller", rng).kill()


def full_disk(campaign: Campaign[Arena], rng: random.Random) -> None:
    """Fill the run's disk until the command has given up, then make room again."""
    filler = campaign.run_dir / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
                file.flush()
        except OSError:
            pass
    campaign.until(lambda: campaign.process.poll() is not None, resume=False)
    filler.unlink()


MOMENTS = {
    "a policy phase": (Learner.policy_phase, ZeroEngine.step),
    "an auxiliary phase": (Learner.auxiliary_phase, ZeroEngine.step),
    "a checkpoint's write": (Learner.begin_save, ZeroEngine.fragments),
}
"""Where a rank is, and what it is about to do there."""


def in_the_midst_of(moment: str, kind: str) -> Fault:
    """SIGKILL inside a phase or a checkpoint's write: rank 1 of the learner kills the controller,
    or itself, as it is there for the second time from now."""

    def strike(campaign: Campaign[Arena], rng: random.Random) -> None:
        campaign.until(lambda: len(campaign.arena.processes(TITLES["learner"])) > 1)
        victim = pick(campaign, "controller", rng) if kind == "controller" else None
        rank = r"run:learner-1"
        pid = campaign.arena.ask(rank, _arm, moment, victim and victim.pid)
        campaign.until(lambda: not psutil.pid_exists(pid), resume=False)

    return strike


def _arm(_: object, moment: str, pid: int | None) -> int:
    (around, inside), target = MOMENTS[moment], pid or os.getpid()
    there, count = False, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal there
        there = True
        try:
            return around(*args, **kwargs)
        finally:
            there = False

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += there
        if there and count == 2:
            os.kill(target, signal.SIGKILL)
        return inside(*args, **kwargs)

    setattr(Learner, around.__name__, watched)
    setattr(ZeroEngine, inside.__name__, mortal)
    return target
