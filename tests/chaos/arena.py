"""A cluster of three nodes on this machine, and real `talipot train` commands upon it.

What a run does is seen from outside alone: its log, its folders, its processes. Faults are done to
processes and files; only where a moment has to be hit (inside the auxiliary phase, inside a
checkpoint's write, a byte on its way to an actor) is a worker told beforehand what to do then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil
import pyarrow.parquet as pq
import ray
import yaml
from ray.cluster_utils import Cluster

from common.config.run import RunConfig
from common.files import one_line
from deploy.workers.placement import NAMESPACE
from tests.workspaces import run_copy

HANG_S = 180.0
"""A run without progress for longer is hung: over every deadline of the recipe and a restart."""
_ANSWER_S = 30.0
_CODES = {8: "StorageError", 9: "WorkerError"}
"""How a command may end by a fault; it must say so in a line of its own."""
_ROOT = Path(__file__).parents[2]
TALIPOT = [sys.executable, "-m", "deploy.cli"]


class Hung(Exception):
    """Nothing moved for longer than every deadline together."""


class Unattributed(Exception):
    """A command ended in a way that a fault does not explain."""


class Place(Protocol):
    """Where commands are run."""

    @property
    def address(self) -> str:
        """The cluster's."""

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command, and append what it prints to a file."""


Where = TypeVar("Where", bound=Place)


class Arena:
    """Three nodes; those but the head may be killed and are then replaced."""

    def __init__(self) -> None:
        os.environ["PYTHONPATH"] = str(_ROOT)
        # The head runs the cluster's own services and, as on KubeRay, no workers.
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            self.add_node()
        ray.init(
            address=self.cluster.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, cwd=_ROOT)

    def add_node(self) -> None:
        self.cluster.add_node(num_cpus=4, object_store_memory=100 * 2**20)

    def processes(self, title: str) -> list[psutil.Process]:
        """Living workers of this cluster whose Ray title begins so, oldest first."""
        found = []
        for node in self.cluster.list_all_nodes():
            for info in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(info.process.pid).children():
                        with contextlib.suppress(psutil.NoSuchProcess):
                            if " ".join(child.cmdline()).startswith(f"ray::{title}"):
                                found.append(child)
        return sorted(found, key=lambda process: process.create_time())

    def ask(self, pattern: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the first living actor whose name matches.

        Raises:
            LookupError: none answers.
        """
        deadline, why = time.monotonic() + 2 * _ANSWER_S, "none has such a name"
        while time.monotonic() < deadline:
            listed = ray.util.list_named_actors(all_namespaces=True)
            for name, namespace in sorted(
                (n["name"], n["namespace"]) for n in listed if re.fullmatch(pattern, n["name"])
            ):
                # One that ended with its controller may still be listed.
                try:
                    actor = ray.get_actor(name, namespace=namespace)
                    call = actor.__ray_call__.remote(function, *arguments)
                    return ray.get(call, timeout=_ANSWER_S)
                except (ValueError, ray.exceptions.RayError) as error:
                    why = f"{name}: {type(error).__name__} {one_line(error)}"
            time.sleep(0.2)
        raise LookupError(f"no actor that matches {pattern} answers; {why}")

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


class Campaign(Generic[Where]):
    """One run, through whatever is done to it."""

    def __init__(
        self, arena: Where, workspace: RunConfig, folder: Path, **sections: dict[str, object]
    ) -> None:
        self.arena = arena
        folder.mkdir(exist_ok=True)
        self.config = run_copy(workspace, folder, **sections)
        self.recipe = folder / "recipe.yaml"
        text = yaml.safe_dump(self.config.model_dump(mode="json"))
        self.recipe.write_text(text, encoding="utf8")
        # Beside the folder: on a disk that is full a command could not even say so.
        self.output = folder.with_name(f"{folder.name}.txt")
        self.process: subprocess.Popen[bytes]
        self.ended: list[str] = []
        """Errors that commands ended with and that a fault explains."""

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    def start(self, *, resume: bool = False) -> None:
        """A `talipot train` command of its own process."""
        chosen = ["--resume", str(self.run_dir)] if resume else ["--config", str(self.recipe)]
        command = [*TALIPOT, "train", *chosen, "--address", self.arena.address]
        self.process = self.arena.start(command, self.output)

    def lines(self) -> int:
        """Iterations that ended so far, those that were done again included."""
        log = self.run_dir / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def iteration(self) -> int:
        """Iterations trained, however often."""
        log = self.run_dir / "metrics.jsonl"
        whole = log.read_text().splitlines() if log.exists() else []
        # The last line may be half written; those before it are not.
        steps = [json.loads(line)["step"] for line in whole[-5:] if line.endswith("}}")]
        return steps[-1] if steps else 0

    def until(self, condition: Callable[[], bool], *, resume: bool = True) -> None:
        """Wait for something; a command that a fault has ended is followed by `--resume`.

        Raises:
            Hung: it does not come, and nothing else moves.
            Unattributed: a command ended in another way than a fault explains.
        """
        moved, seen = time.monotonic(), self.lines()
        while not condition():
            if self.lines() != seen:
                moved, seen = time.monotonic(), self.lines()
            if self.process.poll() == 0 and not condition():
                raise Unattributed("the run ended before everything had struck: too few iterations")
            if time.monotonic() - moved > HANG_S:
                raise Hung(f"{self.run_dir}: nothing for {HANG_S:.0f} s; see {self.output}")
            if resume and self.process.poll() not in (None, 0):
                self.explain()
                self.start(resume=True)
            time.sleep(0.02)

    def explain(self) -> None:
        """Take note of how a command ended.

        Raises:
            Unattributed: neither killed by us nor with an error that names its cause.
        """
        code = self.process.wait()
        if code == -signal.SIGKILL:
            self.ended.append("killed")
            return
        last = [x for x in self.output.read_text().splitlines() if x.startswith("error ")][-1:]
        if code not in _CODES or not last:
            raise Unattributed(f"exit code {code}; see {self.output}")
        self.ended.append(f"{code} {_CODES[code]}")

    def finish(self) -> dict[str, Any]:
        """Wait for the run's end; its facts."""
        self.until(lambda: self.process.poll() == 0)
        facts: dict[str, Any] = json.loads((self.run_dir / "result.json").read_bytes())
        return facts

    def replayed(self) -> bool:
        """Whether the trajectory log, trained again, ends in the run's weights."""
        command = [*TALIPOT, "replay", str(self.run_dir), "--address", self.arena.address]
        return self.arena.start(command, self.output).wait(HANG_S) == 0

    def accounts(self, facts: dict[str, Any]) -> tuple[int, int]:
        """Rollouts lost and doubled: by the log of what was trained, and by the ledger."""
        train = self.config.train
        logs = sorted((self.run_dir / "trajectories").glob("iteration-*.parquet"))
        ids = [i for log in logs for i in pq.read_table(log)["rollout_id"].to_pylist()]
        issued, trained, dropped = (
            facts[f"rollouts_{n}"] for n in ("issued", "trained", "dropped")
        )
        # Prompts that have no signal are replaced by others, so more is issued than is trained.
        wanted = issued if train.dynamic_sampling else train.iterations * train.batch_size
        lost = abs(wanted - dropped - len(set(ids))) + abs(issued - wanted)
        return lost, len(ids) - len(set(ids)) + max(0, trained + dropped - wanted)


@contextlib.contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """A file system of its own that can be filled; gone with this process' mount namespace.

    Raises:
        PermissionError: this process may not mount.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(
            f"a disk that can be filled needs the right to mount: {done.stderr.strip()}; "
            "run as root, or under `unshare --map-root-user --mount`"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
