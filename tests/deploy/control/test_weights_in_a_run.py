"""Which weights rollouts are sampled from: whole ones, the published ones, none too old."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from common.config.run import RunConfig
from common.errors import TrainingError
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, finish
from tests.deploy.control.simulated import lost_object
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_weights_from_elsewhere_are_refused(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Invariant I6: a rollout whose fingerprint is not that of its version stops the run."""
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        publish = controller.position.publish

        def forged(version: int) -> None:
            publish(version)
            weights = controller.collector.weights
            assert weights is not None
            for job in controller.collector.rollout.workers.values():
                ray.get(job.handle.__ray_call__.remote(_lie))

        controller.position.publish = forged  # type: ignore[method-assign]
        with pytest.raises(TrainingError, match="sampled from weights"):
            controller.run()


def test_weights_that_are_lost_before_anyone_holds_them_are_published_again(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        publish, published = controller.position.publish, Counter[int]()

        def lose_one(version: int) -> None:
            publish(version)
            published[version] += 1
            weights = controller.collector.weights
            if weights is not None and published[1] == 1 and version == 1:
                payloads = (lost_object(), *weights.payloads[1:])
                controller.collector.weights = replace(weights, payloads=payloads)

        controller.position.publish = lose_one  # type: ignore[method-assign]
        assert controller.run()["weights_hash"] == reference[1]["weights_hash"]
    assert published == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1}


def _lie(actor: Any) -> None:
    """Make an actor that believes it holds other weights than it was told to load."""
    actor.fingerprint = ""
    actor.generator.buffer.load = lambda manifest, payloads: "0" * 32


@pytest.mark.parametrize("times", [1, 3])
def test_a_flipped_byte_is_read_again_and_counted(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    times: int,
) -> None:
    """Invariant I6: once, and the actor reads again; for good at one actor, and it is replaced."""
    config = run_copy(workspace, tmp_path)
    with Run(config, gang) as controller:
        victim = next(iter(controller.collector.rollout.workers.values()))
        ray.get(victim.handle.__ray_call__.remote(flip, times))
        facts = controller.run()
        assert controller.collector.rollout.losses["corrupt"] == (times > 1)
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    last = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metrics"]["weights_reloaded"] == 1


def test_a_slice_that_is_corrupt_wherever_it_arrives_is_named(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        for worker in controller.collector.rollout.workers.values():
            ray.get(worker.handle.__ray_call__.remote(flip, 3))
        with pytest.raises(
            TrainingError, match=r"version 0: slice of rank 1 arrived corrupted at rollout-\d, 3"
        ):
            controller.run()


def flip(actor: Any, times: int) -> None:
    """Flip a byte of what an actor receives from rank 1, so many times."""
    load, left = actor.generator.buffer.load, times

    def flipped(manifest: Any, payloads: Any) -> str:
        nonlocal left
        if left:
            left -= 1
            damaged = [part.copy() for part in payloads[1]]
            damaged[0][100] ^= 1
            payloads = [payloads[0], damaged]
        found: str = load(manifest, payloads)
        return found

    actor.generator.buffer.load = flipped


def test_asynchronous_mode_bounds_staleness_and_trains_everything(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Invariant I7."""
    config = run_copy(workspace, tmp_path, train={"max_staleness": 2, "iterations": 6})
    facts = finish(config, gang)
    assert facts["rollouts_trained"] == 6 * 16
    stale = []
    for path in sorted((config.run_dir / "trajectories").glob("*.parquet")):
        for row in from_table(pq.read_table(path).drop_columns("iteration"), ScoredTrajectory):
            stale.append(int(row.rollout_id[:6]) - row.policy_version)
    assert max(stale) <= 2
    assert max(stale) >= 1, "rollouts are generated ahead"
    shown: Counter[int] = Counter()
    for line in (config.run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line)["metrics"].items():
            if name.startswith("staleness/"):
                shown[int(name.removeprefix("staleness/"))] += int(value)
    assert shown == Counter(stale), "the metrics are a histogram of all that was trained"
