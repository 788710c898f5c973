"""Prompts that are always or never solved are left out: when, for how long, and over a resume."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config.run import CurriculumConfig, DataConfig, RunConfig
from common.wire.trajectory import RolloutRequest, ScoredTrajectory, from_table
from deploy.control.curriculum import Curriculum
from deploy.control.jobs import Scored
from deploy.control.leases import Lease
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.deploy.control.runs import Run, finish, kill_worker, prompts_of, when
from tests.workspaces import run_copy

cluster = pytest.mark.usefixtures("cluster")
UIDS = ("a", "b", "c", "d", "e")
History = Mapping[str, Sequence[tuple[int, list[float]]]]
"""Prompt -> (iteration, scores of its responses), in order."""


def expected(
    history: History,
    iteration: int,
    settings: CurriculumConfig,
    staleness: int,
    uids: Sequence[str],
    wanted: int,
) -> set[str]:
    """What is left out of an iteration, by going through all that was ever scored."""
    out = set()
    for uid in uids:
        known = [(asked, of) for asked, of in history.get(uid, []) if asked < iteration - staleness]
        streak: list[float] = []  # of the newest iterations that are all alike
        last, settled = -1, False
        for asked, of in known:
            alike = len({score >= settings.solved for score in streak + of}) == 1
            streak = streak + of if alike and not settled else list(of)
            last = asked
            solved = [score >= settings.solved for score in streak]
            settled = len(streak) >= settings.after and (
                (settings.always and all(solved)) or (settings.never and not any(solved))
            )
        if settled and (settings.back_after is None or iteration - last <= settings.back_after):
            out.add(uid)
    return out if len(uids) - len(out) >= wanted else set()


def batch(iteration: int, scores: Mapping[str, list[float]]) -> list[Scored]:
    requests, values = [], []
    for group, (uid, of) in enumerate(scores.items()):
        for score in of:
            name = f"{iteration:06d}-{len(requests):06d}"
            requests.append(
                RolloutRequest(
                    rollout_id=name,
                    group=group,
                    prompt_uid=uid,
                    prompt_text=uid,
                    prompt_ids=[1],
                    seed=0,
                )
            )
            values.append(score)
    lease = Lease(lease_id=0, iteration=iteration, requests=tuple(requests))
    return [
        Scored(
            table=None,  # type: ignore[arg-type]
            rollout_ids=tuple(request.rollout_id for request in requests),
            iteration=iteration,
            policy_version=0,
            leases=(lease,),
            scores=tuple(values),
        )
    ]


@given(
    outcomes=st.lists(
        st.dictionaries(
            st.sampled_from(UIDS), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=3)
        ),
        min_size=1,
        max_size=8,
    ),
    settings=st.builds(
        CurriculumConfig,
        solved=st.just(0.5),
        after=st.integers(1, 4),
        always=st.booleans(),
        never=st.just(True),
        back_after=st.one_of(st.none(), st.integers(1, 3)),
    ),
    staleness=st.integers(0, 2),
    wanted=st.integers(1, 4),
    at=st.integers(0, 8),
)
def test_it_is_what_all_scores_say(
    outcomes: list[dict[str, list[float]]],
    settings: CurriculumConfig,
    staleness: int,
    wanted: int,
    at: int,
) -> None:
    known, history = Curriculum(settings, staleness), defaultdict[str, Any](list)
    for iteration, scores in enumerate(outcomes):
        if iteration == at:  # a checkpoint, and a run that goes on from it
            state = json.loads(json.dumps(known.state()))
            known = Curriculum(settings, staleness)
            known.rewind(iteration, state)
        for issued in range(iteration, iteration + staleness + 1):
            assert known.left_out(issued, UIDS, wanted) == expected(
                history, issued, settings, staleness, UIDS, wanted
            )
        known.trained(iteration, batch(iteration, scores))
        for uid, of in scores.items():
            history[uid].append((iteration, of))


def test_one_miss_long_ago_keeps_no_prompt_in() -> None:
    known = Curriculum(CurriculumConfig(solved=1.0, after=8), 0)
    known.trained(0, batch(0, {"a": [0.0, 1.0, 1.0, 1.0]}))
    for iteration in (1, 2):
        assert known.left_out(iteration, UIDS, 1) == set()
        known.trained(iteration, batch(iteration, {"a": [1.0] * 4}))
    assert known.left_out(3, UIDS, 1) == {"a"}


def test_a_score_as_high_as_the_recipe_says_is_enough() -> None:
    """Scores travel as float32, and 0.9 is more than the float32 next to it."""
    known = Curriculum(CurriculumConfig(solved=0.9, after=2), 0)
    known.trained(0, batch(0, {"a": [float(np.float32(0.9))] * 2, "b": [0.89] * 2}))
    assert {uid: of[0] for uid, of in known.state()["tried"].items()} == {
        "a": "always",
        "b": "never",
    }


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        ({"curriculum": {"solved": 1, "always": False, "never": False}}, "leaves nothing out: set"),
        (
            {"curriculum": {"solved": 1}, "mixture": {"a": {"epochs": 2}}},
            r"data\.mixture\.a\.epochs with data\.curriculum: what is left out would count",
        ),
    ],
)
def test_what_cannot_be_is_refused(data: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        DataConfig.model_validate(data)


# ------------------------------------------------------------------ in a run

TRAIN = {
    "algorithm": "grpo",
    "ppg": None,
    "prompts_per_iteration": 3,
    "samples_per_prompt": 4,
    "iterations": 6,
    "minibatches": 1,
}
REWARD = {"components": {"n": {"kind": "function", "target": "tests.rewards:by_number"}}}


def chosen(workspace: RunConfig, folder: Path, **train: Any) -> RunConfig:
    """A run on twelve prompts, of which a third is always solved, a third never."""
    return run_copy(
        workspace,
        folder,
        data={
            "mixture": {"prompts": {"limit": 12}},
            "curriculum": {"solved": 0.5, "after": 4},
        },
        train=TRAIN | train,
        rollout={"lease_size": 4},
        reward_service=REWARD,
    )


def asked(config: RunConfig) -> list[dict[str, list[float]]]:
    """Of each iteration, the prompts and the scores of their responses."""
    found = []
    for iteration in range(config.train.iterations):
        of: defaultdict[str, list[float]] = defaultdict(list)
        for row in from_table(read_log(config.run_dir, iteration)[0], ScoredTrajectory):
            of[row.prompt_uid].append(row.score)
        found.append(dict(of))
    return found


@pytest.fixture(scope="module")
def whole(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    """A run that nothing happened to."""
    config = chosen(workspace, tmp_path_factory.mktemp("curriculum"))
    return config, finish(config, gang)


def require_without_what_is_left_out(config: RunConfig, staleness: int) -> int:
    """Check every iteration against the log of those before; returns how much was left out."""
    uids = [prompt.uid for prompt in prompts_of(config)[:12]]
    settings, history = config.data.curriculum, defaultdict[str, Any](list)
    assert settings is not None
    lines = [json.loads(line) for line in config.folder.metrics.read_text().splitlines()]
    left_out = 0
    for iteration, scores in enumerate(asked(config)):
        out = expected(history, iteration, settings, staleness, uids, 3)
        assert not out & scores.keys()
        assert lines[iteration]["metrics"]["prompts_left_out"] == len(out)
        left_out += len(out)
        for uid, of in scores.items():
            history[uid].append((iteration, of))
    return left_out


@cluster
def test_what_is_always_or_never_solved_is_not_asked_again(
    whole: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, facts = whole
    assert require_without_what_is_left_out(config, 0) > 12
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 6 * 12


@cluster
def test_a_resumed_run_asks_the_same(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = chosen(workspace, tmp_path)
    finish(config, gang, stop_after=4)
    assert finish(config, gang) == whole[1]
    assert asked(config) == asked(whole[0])


@cluster
def test_a_worker_that_dies_changes_nothing(
    workspace: RunConfig,
    gang: LearnerGang,
    whole: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = chosen(workspace, tmp_path)
    with Run(config, gang) as controller:
        thread = when(lambda: controller.iteration >= 3, lambda: kill_worker(controller, "rollout"))
        facts = controller.run()
        thread.join()
    assert facts["weights_hash"] == whole[1]["weights_hash"]


@cluster
def test_asynchronous_runs_know_what_synchronous_ones_did(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    config = chosen(workspace, tmp_path, max_staleness=1)
    facts = finish(config, gang)
    assert facts["rollouts_trained"] == 6 * 12
    assert require_without_what_is_left_out(config, 1) > 0
