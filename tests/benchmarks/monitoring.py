"""What it costs to be watched: the same iterations with metrics, health and status, and without.

``python -m tests.benchmarks.monitoring`` (four minutes; figures in ``docs/monitoring.md``). Runs of
both kinds take turns over the same workers, at the quickstart's size. Beside the ratio of
their iterations, which has the noise of the machine in it, stands the CPU time that our processes
spend on telling: that of their threads for it, and that of the controller's own calls. What Ray's
agents spend on passing it on is in the ratio alone.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from deploy.control import controller as controlling
from deploy.control.controller import Controller
from deploy.gauges import Gauges
from deploy.health.watch import Watch
from deploy.run_folder.activity import Activity
from deploy.run_folder.log_lines import read_lines
from deploy.run_folder.progress import telling
from deploy.workers.calls import Handle
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from tests.benchmarks.measure import Result, start_ray
from tests.benchmarks.timeline import networks

ITERATIONS, TURNS = 6, 3
PROMPT, RESPONSE = 40, 48


def recipe(folder: Path, name: str) -> RunConfig:
    """The quickstart's sizes, without its auxiliary phase, which only some iterations have."""
    return RunConfig.model_validate(
        {
            "name": name,
            "output": str(folder),
            "model": {
                "vocab_size": 2048,
                "dim": 128,
                "layers": 4,
                "heads": 4,
                "head_dim": 32,
                "context": 128,
            },
            "learner": {
                "ranks": 2,
                "zero_stage": 2,
                "cpus_per_rank": 0.4,
                "micro_batch_tokens": 8192,
                "precision": "bf16",
            },
            "rollout": {
                "actors": 2,
                "cpus_per_actor": 0.4,
                "lease_size": 128,
                "max_response_tokens": RESPONSE,
            },
            "reward_service": {"cpus_per_replica": 0.2},
            "train": {
                "iterations": ITERATIONS,
                "prompts_per_iteration": 256,
                "minibatches": 8,
                "lr": 1e-5,
                "checkpoint_every": 0,
                "ppg": None,
            },
        }
    )


class Spent:
    """CPU seconds of this process's own calls for monitoring."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._of_threads: dict[int, float] = {}

    @property
    def total(self) -> float:
        """Of calls, and of threads that do nothing else."""
        return self.seconds + sum(self._of_threads.values())

    def measured(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, on the clock of its thread; a call within another counts once."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "on", False):
                return call(*args, **kwargs)
            self._inside.on, begin = True, time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside.on = False
                with self._lock:
                    self.seconds += time.thread_time() - begin

        return timed

    def telling(self, path: Path, token: str, ask: Callable[[], Any]) -> Any:
        """The telling of status.json, with all of its thread's time on the clock."""

        def asked() -> Any:
            thread = threading.current_thread()
            if thread.name == "status":
                self._of_threads[id(thread)] = time.thread_time()
            return ask()

        return telling(path, token, asked)


@contextmanager
def told(spent: Spent) -> Iterator[None]:
    """The controller's calls for monitoring are on the clock."""
    with (
        patch.object(Gauges, "set", spent.measured(Gauges.set)),
        patch.object(Gauges, "_tell", spent.measured(Gauges._tell)),
        patch.object(Watch, "look", spent.measured(Watch.look)),
        patch.object(Activity, "add", spent.measured(Activity.add)),
        patch.object(controlling, "telling", spent.telling),
    ):
        yield


@contextmanager
def untold() -> Iterator[None]:
    """The controller tells nothing but its log."""
    nothing: Callable[..., Any] = lambda *_, **__: []  # noqa: E731 for five calls
    with (
        patch.object(Gauges, "set", nothing),
        patch.object(Gauges, "_tell", nothing),
        patch.object(Watch, "look", nothing),
        patch.object(Activity, "add", nothing),
        patch.object(controlling, "telling", lambda *_: nullcontext()),
    ):
        yield


def silence(worker: Any, silent: bool) -> None:
    """In a worker's process: tell nothing, or what is told by default."""
    told_by = worker.gauges
    told_by._tell = (lambda: None) if silent else Gauges._tell.__get__(told_by)


def spent_telling(_: Any) -> float:
    """In a worker's process: CPU seconds of the thread that tells."""
    (thread,) = (t for t in threading.enumerate() if t.name == "gauges")
    times = {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}
    return float(times[thread.native_id])


def everybody(handles: list[Handle], call: Callable[..., Any], *args: Any) -> list[Any]:
    """Call in all processes."""
    found: list[Any] = ray.get([h.__ray_call__.remote(call, *args) for h in handles])
    return found


def run() -> list[Result]:
    """Seconds of an iteration with and without, and the CPU time of telling."""
    seconds: dict[str, list[float]] = {"told": [], "untold": []}
    spent, cpu = Spent(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = recipe(Path(folder), "base")
        paths = networks(base)
        tokenizer = base.run_dir / "tokenizer.json"
        rng = np.random.default_rng(0)
        prompts = [
            EncodedPrompt(uid=str(i), text="", ids=rng.integers(2, 2048, PROMPT).tolist())
            for i in range(256 * ITERATIONS)
        ]
        start_ray(2**29)
        gang = LearnerGang(base, base.name)
        pools = (
            rollout_pool(base, base.name, tokenizer, paths[0]),
            reward_pool(base, base.name, tokenizer, *paths),
        )
        for turn in range(TURNS):
            for kind in seconds:
                config = recipe(Path(folder), f"{kind}-{turn}")
                for part in ("tokenizer.json", "sft", "reward_model"):
                    (config.run_dir).mkdir(exist_ok=True)
                    (config.run_dir / part).symlink_to(base.run_dir / part)
                workers = [w.handle for pool in pools for w in pool.workers.values()]
                handles = [*gang.ranks, *workers]
                everybody(handles, silence, kind == "untold")
                before = sum(everybody(handles, spent_telling))
                with told(spent) if kind == "told" else untold():
                    Controller(config, prompts, gang, *pools).run()
                if kind == "told":
                    cpu += sum(everybody(handles, spent_telling)) - before
                lines = read_lines(config.folder.metrics).lines
                seconds[kind] += [line.metrics["seconds"] for line in lines[1:]]
        for pool in pools:
            pool.stop()
        gang.stop()
        ray.shutdown()
    on, off = (median(seconds[kind]) for kind in ("told", "untold"))
    each = (cpu + spent.total) / (TURNS * ITERATIONS)
    return [
        Result(
            key="monitoring_ratio",
            value=on / off,
            metric="an iteration with metrics, health, status and activity",
            ours=f"{on:.2f} s",
            baseline=f"{off:.2f} s without",
        ),
        Result(
            key="monitoring_cpu_share",
            value=each / on,
            metric="CPU time of telling, of our processes",
            ours=f"{1e3 * each:.1f} ms an iteration",
            baseline=f"an iteration of {on:.2f} s",
        ),
    ]


if __name__ == "__main__":
    for found in run():
        print(f"{found.metric}: {found.ours}, {found.baseline}: {found.value:.4f}")
