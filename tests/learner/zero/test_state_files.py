"""The engines' state on disk: other numbers of ranks read it, the same one goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from common.config.run import RunConfig
from deploy.workers.gang import LearnerGang
from learner.zero.state_files import snapshot
from learner.zero.state_parts import masters
from tests.learner.zero.test_engine import engine_of
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")
TRAIN: dict[str, Any] = {"iterations": 10, "stop_kl": None, "kl_target": 0.5}
WHOLE, MORE = 3, 4
"""Iterations before and after the checkpoint; an iteration is 2 steps of each network, and there is
an auxiliary phase before the checkpoint and one after it."""


def iterate(gang: LearnerGang, first: int, count: int) -> list[float]:
    """Some iterations and auxiliary phases; the losses."""
    losses = []
    for iteration in range(first, first + count):
        tables = [ray.put(table) for table in trajectories(seed=iteration)]
        found = gang.policy_phase(iteration, None, tables)
        losses += [found["policy_loss"], found["value_loss"]]
        if iteration % 3 == 2:
            losses.append(gang.auxiliary_phase(iteration)["auxiliary/value_loss"])
    return losses


@pytest.mark.parametrize(
    ("before", "zero", "precision"),
    [
        (2, 0, "fp32"),
        (2, 2, "fp32"),
        (1, 3, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.chaos)
            for case in [
                *((2, 1, "fp32"), (2, 3, "fp32"), (2, 3, "bf16")),
                *((1, 1, "fp32"), (1, 2, "fp32"), (1, 3, "bf16")),
            ]
        ),
    ],
)
def test_another_number_of_ranks_goes_on(
    workspace: RunConfig,
    gangs: dict[int, LearnerGang],
    tmp_path: Path,
    zero: int,
    precision: str,
    before: int,
) -> None:
    config = run_copy(workspace, tmp_path, train=TRAIN, learner=learner_of(zero, precision))
    goes_on(config, gangs[before], gangs[3 - before], tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_and_four_ranks_go_on_from_each_other(
    workspace: RunConfig, gangs: dict[int, LearnerGang], tmp_path: Path, zero: int
) -> None:
    config = run_copy(
        workspace, tmp_path, train=TRAIN, learner=learner_of(zero, "fp32") | {"ranks": 4}
    )
    four = LearnerGang(config, f"four-{zero}")
    try:
        for name, old, new in (("two", gangs[2], four), ("four", four, gangs[2])):
            (tmp_path / name).mkdir()
            goes_on(config, old, new, tmp_path / name)
    finally:
        four.stop()


def learner_of(zero: int, precision: str) -> dict[str, Any]:
    return {"zero_stage": zero, "precision": precision}


def goes_on(config: RunConfig, old: LearnerGang, new: LearnerGang, tmp_path: Path) -> None:
    """Train on in both from what one has saved, and in that one from what it had."""
    precision, before = config.learner.precision, len(old.ranks)
    old.begin_train(config)
    iterate(old, 0, WHOLE)
    state = old.save(tmp_path / "saved")
    for network in ("policy", "value"):
        files = sorted((tmp_path / "saved" / network).glob("rank-*"))
        sizes = [path.stat().st_size for path in files]
        assert len(sizes) == before
        assert max(sizes) < 1.1 * sum(sizes) / before, "each rank writes its own part"
    expected = iterate(old, WHOLE, MORE)
    whole = old.export_policy(tmp_path / "whole")

    old.begin_train(config)
    old.load(tmp_path / "saved", state)
    assert iterate(old, WHOLE, MORE) == expected
    assert old.export_policy(tmp_path / "again") == whole

    new.begin_train(config)
    new.load(tmp_path / "saved", state)
    # bf16 rounds what other orders of summing leave; the masters are what is compared in fp32.
    tolerance = 2e-3 if precision == "bf16" else 1e-5
    assert iterate(new, WHOLE, MORE) == pytest.approx(expected, abs=tolerance)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_snapshot_is_what_was_while_training_goes_on(tmp_path: Path, zero: int) -> None:
    engine = engine_of(nn.Linear(3, 2), zero_stage=zero)
    before = {name: tensor.clone() for name, tensor in engine.full_state().items()}
    taken = snapshot(engine)
    engine.backward(engine(torch.ones(4, 3)).sum(), last=True)
    engine.step(0.5, "the test")
    after = engine.full_state()
    taken.write(tmp_path)
    found = dict(masters(tmp_path))
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor)
        assert not torch.equal(found[name], after[name])
