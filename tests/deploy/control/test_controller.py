"""The whole loop on a real Ray cluster: determinism, resume, deaths, asynchrony, refusals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.data.tokenizer import Tokenizer
from common.endings import at_the_end
from common.errors import CheckpointError, RewardError, TrainingError, WorkerError
from common.wire.trajectory import ScoredTrajectory, from_table
from deploy.control.controller import Controller
from deploy.stages.encoding import read_encoded_prompts
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from learner.batch.trajectory_log import read_log
from tests.conftest import run_copy
from tests.deploy.control.simulated import lost_object
from tests.reward_service.endpoint import DOWN, Endpoint, Reply, Rows, scores

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    made = LearnerGang(workspace, "controller-tests")
    yield made
    made.stop()


def prompts_of(config: RunConfig) -> list[EncodedPrompt]:
    tokenizer = Tokenizer.load(config.run_dir / "tokenizer.json")
    return read_encoded_prompts(config.data.prompts, tokenizer, config)[0]


_IDLE: dict[str, tuple[Pool, Pool]] = {}
"""Pools of finished runs by what they were made for; starting workers is what tests wait for."""


class Run:
    """A controller in this process, with real workers."""

    count = 0

    def __init__(
        self,
        config: RunConfig,
        gang: LearnerGang,
        stop_after: int | None = None,
        *,
        start: bool = True,
    ) -> None:
        Run.count += 1
        folder = config.run_dir.absolute()
        sft = folder / "sft" / "policy.safetensors"
        reward = folder / "reward_model" / "reward.safetensors"
        kinds = {c.kind for c in config.reward_service.components.values()}
        model = reward if "model" in kinds else None
        self.key = (
            f"{config.rollout.actors} {config.train.max_staleness > 0} {config.train.lora} "
            f"{config.rollout.lora} "
            f"{config.reward_service.model_dump_json()}"
        )
        name = f"run{Run.count}"
        self.pools = (_IDLE.pop(self.key, None) if start else None) or (
            rollout_pool(config, name, folder / "tokenizer.json", sft, start=start),
            reward_pool(config, name, folder / "tokenizer.json", sft, model, start=start),
        )
        self.failures = sum(pool.failures for pool in self.pools)
        self.controller = Controller(config, prompts_of(config), gang, *self.pools, stop_after)

    def __enter__(self) -> Controller:
        return self.controller

    def __exit__(self, *_: object) -> None:
        busy = [w.busy for pool in self.pools for w in pool.workers.values()]
        if busy and not any(busy) and sum(pool.failures for pool in self.pools) == self.failures:
            _IDLE[self.key] = self.pools
            return
        for pool in self.pools:
            pool.stop()


@pytest.fixture(scope="module", autouse=True)
def _stop_idle_pools() -> Iterator[None]:
    yield
    for pools in _IDLE.values():
        for pool in pools:
            pool.stop()
    _IDLE.clear()


def finish(config: RunConfig, gang: LearnerGang, stop_after: int | None = None) -> dict[str, Any]:
    with Run(config, gang, stop_after) as controller:
        facts = controller.run()
    assert facts["rollouts_issued"] == facts["rollouts_trained"] + facts["rollouts_dropped"]
    return facts


@pytest.fixture(scope="module")
def reference(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    """An undisturbed synchronous run."""
    config = run_copy(workspace, tmp_path_factory.mktemp("reference"))
    return config, finish(config, gang)


def test_a_run_trains_every_rollout_once_and_logs_it(
    reference: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, facts = reference
    assert facts["finished"]
    assert facts["rollouts_trained"] == 4 * 16
    logged = [
        row
        for path in sorted((config.run_dir / "trajectories").glob("*.parquet"))
        for row in from_table(pq.read_table(path), ScoredTrajectory)
    ]
    ids = [row.rollout_id for row in logged]
    assert len(ids) == len(set(ids)) == 64
    versions = {row.rollout_id[:6]: row.policy_version for row in logged}
    assert versions == {f"{i:06d}": i for i in range(4)}, "synchronous: no rollout is stale"
    metrics = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4
    assert all('"staleness/0": 16.0' in line and "staleness/1" not in line for line in metrics)
    assert '"auxiliary/clone_kl_first": 0.0' in metrics[1]


def test_one_seed_gives_one_result_and_another_seed_another(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    again = finish(run_copy(workspace, tmp_path / "a"), gang)
    assert again["weights_hash"] == reference[1]["weights_hash"]
    other = run_copy(workspace, tmp_path / "b").model_copy(update={"seed": 7})
    assert finish(other, gang)["weights_hash"] != again["weights_hash"]


@pytest.mark.parametrize("actors", [1, 4])
def test_the_number_of_actors_changes_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    actors: int,
) -> None:
    """Invariant I5."""
    config = run_copy(workspace, tmp_path, rollout={"actors": actors})
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    stop: int,
) -> None:
    """Stopped inside a phase (auxiliary memory half full) and at its end."""
    config = run_copy(workspace, tmp_path)
    first = finish(config, gang, stop_after=stop)
    assert not first["finished"]
    second = finish(config, gang)
    assert second["finished"]
    assert second["weights_hash"] == reference[1]["weights_hash"]
    assert second["rollouts_issued"] == 64


def test_resume_keeps_the_kl_controller_and_the_masters_of_bf16(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    train = {"kl_target": 0.5, "kl_horizon": 50, "ppg": None}
    learner = {"precision": "bf16", "zero_stage": 1}
    whole = run_copy(workspace, tmp_path / "whole", train=train, learner=learner)
    parts = run_copy(workspace, tmp_path / "parts", train=train, learner=learner)
    expected = finish(whole, gang)["weights_hash"]
    finish(parts, gang, stop_after=2)
    assert finish(parts, gang)["weights_hash"] == expected
    logs = [(c.run_dir / "metrics.jsonl").read_text().splitlines() for c in (whole, parts)]
    coefficients = [[json.loads(x)["metrics"]["kl_coef"] for x in log] for log in logs]
    assert coefficients[0] == coefficients[1]
    assert len(set(coefficients[0])) == 4


def test_a_damaged_checkpoint_is_passed_over_or_named(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = run_copy(workspace, tmp_path, train={"checkpoint_every": 1})
    finish(config, gang, stop_after=3)
    newest = sorted((config.run_dir / "checkpoints").iterdir())[-1]
    (newest / "state.json").write_text("{", encoding="utf8")
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]
    for folder in (config.run_dir / "checkpoints").iterdir():
        (folder / "state.json").write_text("{", encoding="utf8")
    with pytest.raises(CheckpointError, match="damaged"):
        finish(config, gang)


def kill_worker(controller: Controller, kind: str) -> None:
    """SIGKILL one worker's process while the run goes on."""
    pool = controller.collector.rollout if kind == "rollout" else controller.collector.reward
    assert pool is not None
    worker = next(iter(pool.workers.values()))
    pid = ray.get(worker.handle.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act once, from another thread, as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["rollout", "reward"])
def test_sigkill_of_a_worker_loses_and_doubles_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    kind: str,
) -> None:
    config = run_copy(workspace, tmp_path)
    with Run(config, gang) as controller:
        thread = when(lambda: controller.iteration >= 1, lambda: kill_worker(controller, kind))
        facts = controller.run()
        thread.join()
    assert facts["worker_failures"] == 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    assert facts["weights_hash"] == reference[1]["weights_hash"]


def test_scaling_live_with_a_sigkill_changes_no_result(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Invariant I5: 2 -> 4 -> 1 actors while the run goes on, and one of them killed."""
    config = run_copy(workspace, tmp_path)
    with Run(config, gang) as controller:
        # Each in an iteration of its own: the loop works on while these act.
        threads = [
            when(lambda: controller.iteration >= 1, lambda: controller.scale(4, None)),
            when(lambda: controller.iteration >= 2, lambda: kill_worker(controller, "rollout")),
            when(lambda: controller.iteration >= 3, lambda: controller.scale(1, None)),
        ]
        facts = controller.run()
        for thread in threads:
            thread.join()
        controller.collector.rollout.tend()
        assert controller.collector.rollout.target == 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    said = [json.loads(x) for x in (config.run_dir / "events.jsonl").read_text().splitlines()]
    assert [x["detail"] for x in said if x["what"] == "scaled"] == ["from 2 to 4", "from 4 to 1"]
    assert [x["what"] for x in said].count("died") == 1


def test_a_worker_that_keeps_dying_ends_the_run_with_its_cause(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        # The third death: the pool counts it before the lease that it cost does.
        controller.collector.rollout.max_failures = 0
        controller.collector.rollout.make = lambda name: _Broken.options(num_cpus=0.1).remote()
        controller.collector.rollout.stop()
        controller.collector.rollout.scale(2)
        with pytest.raises(WorkerError, match=r"3 rollout workers failed within.*rollout-\d"):
            controller.run()


@ray.remote
class _Broken:
    """A worker whose process ends at every call."""

    def generate(self, *_: object) -> None:
        os._exit(1)


def test_weights_from_elsewhere_are_refused(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Invariant I6: a rollout whose fingerprint is not that of its version stops the run."""
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        publish = controller._publish

        def forged(version: int) -> None:
            publish(version)
            weights = controller.collector.weights
            assert weights is not None
            for job in controller.collector.rollout.workers.values():
                ray.get(job.handle.__ray_call__.remote(_lie))

        controller._publish = forged  # type: ignore[method-assign]
        with pytest.raises(TrainingError, match="sampled from weights"):
            controller.run()


def test_weights_that_are_lost_before_anyone_holds_them_are_published_again(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    with Run(run_copy(workspace, tmp_path), gang) as controller:
        publish, published = controller._publish, Counter[int]()

        def lose_one(version: int) -> None:
            publish(version)
            published[version] += 1
            weights = controller.collector.weights
            if weights is not None and published[1] == 1 and version == 1:
                payloads = (lost_object(), *weights.payloads[1:])
                controller.collector.weights = replace(weights, payloads=payloads)

        controller._publish = lose_one  # type: ignore[method-assign]
        assert controller.run()["weights_hash"] == reference[1]["weights_hash"]
    assert published == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1}


def _lie(actor: Any) -> None:
    """Make an actor that believes it holds other weights than it was told to load."""
    actor.fingerprint = ""
    actor.buffer.load = lambda manifest, payloads: "0" * 32


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
        ray.get(victim.handle.__ray_call__.remote(_flip, times))
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
            ray.get(worker.handle.__ray_call__.remote(_flip, 3))
        with pytest.raises(
            TrainingError, match=r"version 0: slice of rank 1 arrived corrupted at rollout-\d, 3"
        ):
            controller.run()


def _flip(actor: Any, times: int) -> None:
    """Flip a byte of what an actor receives from rank 1, so many times."""
    load, left = actor.buffer.load, times

    def flipped(manifest: Any, payloads: Any) -> str:
        nonlocal left
        if left:
            left -= 1
            damaged = [part.copy() for part in payloads[1]]
            damaged[0][100] ^= 1
            payloads = [payloads[0], damaged]
        found: str = load(manifest, payloads)
        return found

    actor.buffer.load = flipped


def test_asynchronous_mode_bounds_staleness_and_trains_everything(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Invariant I7."""
    config = run_copy(workspace, tmp_path, train={"max_staleness": 2, "iterations": 6})
    facts = finish(config, gang)
    assert facts["rollouts_trained"] == 6 * 16
    stale = []
    for path in sorted((config.run_dir / "trajectories").glob("*.parquet")):
        for row in from_table(pq.read_table(path), ScoredTrajectory):
            stale.append(int(row.rollout_id[:6]) - row.policy_version)
    assert max(stale) <= 2
    assert max(stale) >= 1, "rollouts are generated ahead"
    shown: Counter[int] = Counter()
    for line in (config.run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line)["metrics"].items():
            if name.startswith("staleness/"):
                shown[int(name.removeprefix("staleness/"))] += int(value)
    assert shown == Counter(stale), "the metrics are a histogram of all that was trained"


@pytest.mark.parametrize("how", ["merged", "unmerged"])
def test_adapters_are_trained_on_what_they_sampled(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, how: str
) -> None:
    """Also after a resume; the adapter itself sampled, not the base that it has left."""
    train = {"lora": {"rank": 4}, "iterations": 3, "lr": 0.05, "ppg": None, "kl_coef": 0.0}
    config = run_copy(workspace, tmp_path, train=train, rollout={"lora": how})
    finish(config, gang, stop_after=2)
    assert finish(config, gang)["finished"]
    rows = from_table(read_log(config.run_dir, 2)[0], ScoredTrajectory)
    assert {row.adapter for row in rows} == {"policy"}
    assert {row.policy_version for row in rows} == {2}
    away = [abs(sum(row.behavior_logprobs) - sum(row.ref_logprobs)) for row in rows]
    assert max(away) > 0.1


def test_function_rewards_need_no_reward_model(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    components = {
        "length": {"kind": "function", "target": "tests.rewards:length", "weight": 0.5},
        "constant": {"kind": "function", "target": "tests.rewards:one"},
    }
    config = run_copy(workspace, tmp_path, reward_service={"components": components})
    finish(config, gang)
    rows = from_table(
        pq.read_table(config.run_dir / "trajectories" / "iteration-000000.parquet"),
        ScoredTrajectory,
    )
    for row in rows:
        assert row.score_components == {"length": len(row.response_text), "constant": 1.0}
        assert row.score == pytest.approx(0.5 * len(row.response_text) + 1.0)
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])["metrics"]
    lengths = [len(row.response_text) for row in rows]
    assert first["component/length"] == pytest.approx(sum(lengths) / 16), "of all 16, not one call"
    assert first["component/constant"] == 1.0


def test_a_broken_reward_function_stops_the_run_and_is_named(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    components = {"bad": {"kind": "function", "target": "tests.rewards:not_a_number"}}
    config = run_copy(workspace, tmp_path, reward_service={"components": components})
    with pytest.raises(RewardError, match=r"tests\.rewards:not_a_number returned nan"):
        finish(config, gang)


def test_a_dead_endpoint_dead_letters_and_says_so(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    endpoint = {"kind": "http", "target": "http://127.0.0.1:9/score", "timeout_s": 0.2}
    components = {"down": endpoint | {"max_retries": 0}}
    config = run_copy(
        workspace,
        tmp_path,
        reward_service={"components": components},
        train={"iterations": 1, "ppg": None},
    )
    with pytest.raises(RewardError, match=r"given up by the reward service.*ConnectError"):
        finish(config, gang)


def test_no_count_falls_on_a_resume(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    """Of workers lost, and of what a flaky endpoint cost."""

    def behave(number: int, rows: Rows) -> Reply:
        return DOWN if number % 5 == 4 else scores([(row["rollout_id"], 1.0) for row in rows])

    with Endpoint(behave) as endpoint:
        remote = {"kind": "http", "target": endpoint.url, "batch_size": 4}
        config = run_copy(workspace, tmp_path, reward_service={"components": {"remote": remote}})
        with Run(config, gang, stop_after=3) as controller:
            thread = when(
                lambda: controller.iteration >= 1, lambda: kill_worker(controller, "rollout")
            )
            assert controller.run()["worker_failures"] == 1
            thread.join()
        assert finish(config, gang)["worker_failures"] == 1
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["metrics"] for line in lines]
    for name in ("workers_lost/rollout", "http/remote/requests", "http/remote/failures"):
        values = [metrics[name] for metrics in logged]
        assert values == sorted(values), name
    last = logged[-1]
    assert last["workers_lost/rollout"] == last["workers_lost/rollout/died"] == 1
    assert last["http/remote/requests"] == len(endpoint.calls)
    assert last["http/remote/failures"] == last["http/remote/retries"] == len(endpoint.calls) // 5
    assert last["http/remote/dead_letters"] == last["http/remote/circuit_opened"] == 0


def test_everything_starts_at_once(workspace: RunConfig, tmp_path: Path) -> None:
    """Actors and reward workers are there when the gang is, not some seconds after."""
    config = run_copy(workspace, tmp_path)
    gang = LearnerGang(config, "at-once", start=False)
    with Run(config, gang, start=False) as controller:
        with at_the_end(controller.end_workers):
            controller._start_workers()
            pools = controller.collector.rollout, controller.collector.reward
            workers = [w for pool in pools if pool for w in pool.workers.values()]
            assert len(workers) == 3, "asked for while the gang started"
            # Looked after while it begins: whoever answers in that time works from then on.
            for worker in workers:
                ray.get(worker.handle.__ray_call__.remote(lambda _: None))
            gang.begin_train(config, controller.collector.tend)
            assert [w.state for w in workers] == ["working"] * 3
        assert not gang.started


def test_nan_weights_stop_the_run(workspace: RunConfig, gang: LearnerGang, tmp_path: Path) -> None:
    config = run_copy(workspace, tmp_path, train={"lr": 1e30, "value_lr": 1e30, "ppg": None})
    with pytest.raises(TrainingError, match="iteration"):
        finish(config, gang)
