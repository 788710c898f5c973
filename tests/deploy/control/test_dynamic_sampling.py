"""Prompts without a signal are replaced by others: what is trained, booked, and resumed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.wire.trajectory import RolloutRequest, ScoredTrajectory, from_table
from deploy.control.batches import groups_of, without_signal
from deploy.control.jobs import Scored
from deploy.control.leases import Lease
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.deploy.control.runs import Run, finish, kill_worker, when
from tests.workspaces import run_copy

cluster = pytest.mark.usefixtures("cluster")
FLAT = {"kind": "function", "target": "tests.rewards:flat_for_even_numbers"}
DYNAMIC = {
    "algorithm": "rloo",
    "ppg": None,
    "prompts_per_iteration": 4,
    "samples_per_prompt": 4,
    "dynamic_sampling": 6,
    "iterations": 3,
}


def request(name: str, group: int) -> RolloutRequest:
    return RolloutRequest(
        rollout_id=name, group=group, prompt_uid="p", prompt_text="p", prompt_ids=[1], seed=0
    )


def scored(
    groups: dict[int, list[float]], left_out: frozenset[str] = frozenset(), first: int = 0
) -> Scored:
    """A table: scores of each group's responses, which are numbered from `first` on."""
    requests, scores = [], []
    for group, of in groups.items():
        for at, score in enumerate(of, first):
            requests.append(request(f"000000-{group * 10 + at:06d}", group))
            scores.append(score)
    return Scored(
        table=None,  # type: ignore[arg-type]
        rollout_ids=tuple(r.rollout_id for r in requests),
        iteration=0,
        policy_version=0,
        leases=(Lease(lease_id=0, iteration=0, requests=tuple(requests)),),
        scores=tuple(scores),
        left_out=left_out,
    )


def test_a_prompt_tells_nothing_when_all_its_scores_are_one() -> None:
    batch = [scored({0: [1.0, 1.0], 1: [0.5, 1.0]}), scored({2: [0.0, 0.0], 3: [2.0]})]
    flat = without_signal(batch)
    assert flat == {"000000-000000", "000000-000001", "000000-000020", "000000-000021"} | {
        "000000-000030"
    }
    assert (groups_of(batch), groups_of(batch, flat)) == (4, 1)
    # What is left out already, dead or lone, counts for nothing.
    part = [scored({0: [1.0, 3.0, 1.0]}, frozenset({"000000-000001"}))]
    assert without_signal(part) == {"000000-000000", "000000-000002"}


def test_a_prompt_in_two_tables_is_one() -> None:
    assert without_signal([scored({0: [1.0, 1.0]}), scored({0: [2.0]}, first=2)]) == frozenset()


def dynamic(workspace: RunConfig, folder: Path, **train: Any) -> RunConfig:
    return run_copy(
        workspace,
        folder,
        train=DYNAMIC | train,
        reward_service={"components": {"flat": FLAT}},
    )


@pytest.fixture(scope="module")
def whole(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    """A run that nothing happened to."""
    config = dynamic(workspace, tmp_path_factory.mktemp("dynamic"))
    return config, finish(config, gang)


def groups(config: RunConfig, iteration: int) -> dict[int, list[ScoredTrajectory]]:
    found: defaultdict[int, list[ScoredTrajectory]] = defaultdict(list)
    for row in from_table(read_log(config.run_dir, iteration)[0], ScoredTrajectory):
        found[row.group].append(row)
    return found


@cluster
def test_every_batch_is_full_of_prompts_that_tell_something(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config, facts = whole
    assert facts["rollouts_trained"] == 3 * 16
    assert facts["rollouts_dropped"] == facts["rollouts_issued"] - 3 * 16 > 0
    assert facts["rollouts_in_flight"] == 0
    lines = [json.loads(line) for line in config.folder.metrics.read_text().splitlines()]
    assert lines[-1]["metrics"]["dropped/no signal"] == facts["rollouts_dropped"]
    plain = dynamic(workspace, tmp_path, dynamic_sampling=0)
    finish(plain, gang)
    further = 0
    for iteration in range(3):
        found = groups(config, iteration)
        assert len(found) == 4
        assert all(len({row.score for row in rows}) > 1 for rows in found.values())
        assert lines[iteration]["metrics"]["prompts_trained"] == 4
        further += sum(group >= 4 for group in found)
        # The stream of prompts goes on as without it.
        first = {group: rows[0].prompt_uid for group, rows in groups(plain, iteration).items()}
        ours = {group: rows[0].prompt_uid for group, rows in found.items() if group < 4}
        assert ours.items() <= first.items()
    assert further > 0


@cluster
def test_a_resumed_run_ends_in_the_same_weights(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = dynamic(workspace, tmp_path)
    finish(config, gang, stop_after=1)
    facts = finish(config, gang)
    assert facts == whole[1]


@cluster
@pytest.mark.parametrize("kind", ["rollout", "reward"])
def test_a_worker_that_dies_changes_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    kind: str,
) -> None:
    config = dynamic(workspace, tmp_path)
    with Run(config, gang) as controller:
        # While prompts in place of others are under way.
        thread = when(
            lambda: controller.ledger.issued > 16 * (controller.iteration + 1),
            lambda: kill_worker(controller, kind),
        )
        facts = controller.run()
        thread.join()
    assert facts["worker_failures"] >= 1
    for name in ("weights_hash", "rollouts_issued", "rollouts_trained", "rollouts_dropped"):
        assert facts[name] == whole[1][name], name


@cluster
def test_stopped_while_others_are_collected_it_goes_on_the_same(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = dynamic(workspace, tmp_path)
    with Run(config, gang) as controller:
        thread = when(lambda: controller.ledger.issued > 16, controller.stop)
        stopped = controller.run()
        thread.join()
    assert not stopped["finished"]
    facts = finish(config, gang)
    for name in ("weights_hash", "rollouts_issued", "rollouts_trained", "rollouts_dropped"):
        assert facts[name] == whole[1][name], name


@cluster
def test_where_nothing_tells_anything_the_prompts_are_trained_on_as_without(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = run_copy(
        workspace,
        tmp_path,
        train=DYNAMIC | {"dynamic_sampling": 2, "iterations": 1},
        reward_service={"components": {"one": {"kind": "function", "target": "tests.rewards:one"}}},
    )
    facts = finish(config, gang)
    assert (facts["rollouts_issued"], facts["rollouts_trained"]) == (3 * 16, 16)
    assert sorted(groups(config, 0)) == [0, 1, 2, 3]


@cluster
def test_asynchronous_mode_keeps_its_bounds(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = dynamic(workspace, tmp_path, max_staleness=2)
    facts = finish(config, gang)
    assert facts["rollouts_trained"] == 3 * 16
    for iteration in range(3):
        rows = [row for rows in groups(config, iteration).values() for row in rows]
        assert {iteration - row.policy_version for row in rows} <= {0, 1, 2}
