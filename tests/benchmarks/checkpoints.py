"""Prints what checkpoints take: bytes of each rank, seconds, and how long a controller stood still.

``python -m tests.benchmarks.checkpoints``: policy and value network of 37 million parameters each.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from common.config.run import RunConfig
from deploy.workers.gang import LearnerGang
from tests.benchmarks.measure import start_ray
from tests.deploy.control.runs import Run, stop_idle_pools
from tests.scored import trajectories
from tests.workspaces import make_workspace, run_copy, write_networks

SHAPE: dict[str, Any] = {"dim": 512, "layers": 6, "heads": 8, "head_dim": 64}


def written(workspace: RunConfig, root: Path, ranks: int) -> None:
    """Bytes that each rank writes, and seconds, under ZeRO 3."""
    learner: dict[str, Any] = {"ranks": ranks, "zero_stage": 3}
    config = run_copy(workspace, root / f"{ranks} ranks", model=SHAPE, learner=learner)
    write_networks(config)
    gang = LearnerGang(config, f"checkpoints-{ranks}")
    gang.begin_train(config)
    gang.policy_phase(0, None, [ray.put(table) for table in trajectories()])
    folder = root / f"saved by {ranks}"
    folder.mkdir()
    begin = time.perf_counter()
    state = gang.begin_save(folder)
    copied = time.perf_counter() - begin
    gang.saved()
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    gang.load(folder, state)
    loaded = time.perf_counter() - begin
    gang.stop()
    sizes = [
        sum(path.stat().st_size for path in folder.rglob(f"rank-{rank:05d}.safetensors"))
        for rank in range(ranks)
    ]
    listed = ", ".join(f"{size / 2**20:.1f}" for size in sizes)
    print(
        f"{ranks} ranks write {listed} MiB: copied in {copied:.2f} s, there in {whole:.2f} s, "
        f"read in {loaded:.2f} s"
    )


def paused(workspace: RunConfig, root: Path, every: int) -> None:
    """The longest time between two turns of the collector, in asynchronous mode."""
    train: dict[str, Any] = {
        "checkpoint_every": every,
        "iterations": 5,
        "max_staleness": 1,
        "ppg": None,
    }
    config = run_copy(workspace, root / f"every {every}", model=SHAPE, train=train)
    write_networks(config)
    gang, ended, pauses = LearnerGang(config, f"pauses-{every}"), 0.0, [0.0]
    with Run(config, gang) as controller:
        whole = controller.collector.pump

        def pump(timeout: float = 0.1) -> None:
            nonlocal ended
            if ended:
                pauses.append(time.perf_counter() - ended)
            whole(timeout)
            ended = time.perf_counter()

        controller.collector.pump = pump  # type: ignore[method-assign]
        controller.run()
    gang.stop()
    print(
        f"a checkpoint every {every or 5} iterations: rollouts stood still for {max(pauses):.3f} s"
    )


def main() -> None:
    start_ray(cpus=8)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "workspace").mkdir()
        workspace = make_workspace(root / "workspace")
        for ranks in (1, 2, 4):
            written(workspace, root, ranks)
        for every in (0, 1):
            paused(workspace, root, every)
        stop_idle_pools()
    ray.shutdown()


if __name__ == "__main__":
    main()
