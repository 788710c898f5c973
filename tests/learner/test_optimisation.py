"""The one loop of optimisation, with an engine that only counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from common.errors import TrainingError
from learner.batch.experience import Sequences
from learner.batch.shards import MicroBatch, Shards
from learner.optimisation import Loss, Objective, Plan, Step, Whole, optimise
from learner.zero.engine import ZeroEngine

pytestmark = pytest.mark.usefixtures("one_rank")
ROWS = Sequences(prompts=[[5]] * 6, responses=[[7] * n for n in (1, 2, 3, 4, 5, 6)])


class Counter:
    """What an engine was asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.calls.append(("backward", last))

    def step(self, lr: float, where: str) -> float:
        self.calls.append((lr, where))
        return 0.5


class Tokens(Objective):
    """Counts tokens; stops after `most` steps and refuses step `bad`."""

    name = "count"

    def __init__(self, most: int = 99, bad: int = 99, value: float = 1.0) -> None:
        self.most, self.bad, self.value, self.taken = most, bad, value, 0

    def loss(self, micro: MicroBatch, whole: Whole) -> Loss:
        count = micro.mask_BR.sum()
        return Loss(torch.tensor(self.value) * count / whole.tokens, {"count": count})

    def problem(self, steps: int, sums: Mapping[str, float]) -> str:
        return "no further" if steps == self.bad else ""

    def enough(self, step: Step) -> bool:
        self.taken += 1
        return self.taken == self.most


def run(objective: Objective, budget: int = 8) -> tuple[list[Step], list[Any]]:
    engine, plan = Counter(), Plan(phase="p", iteration=3, epochs=2, minibatches=3, lr=0.1)
    shards = Shards(seed=0, budget=budget, device=torch.device("cpu"))
    return optimise(cast(ZeroEngine, engine), objective, ROWS, shards, plan), engine.calls


def test_every_epoch_sees_every_token_once_and_a_minibatch_is_a_step() -> None:
    steps, calls = run(Tokens())
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 1):
        mine = [step for step in steps if step.epoch == epoch]
        assert sum(step.sums["count"] for step in mine) == sum(step.tokens for step in mine) == 21
    assert all(step.loss == pytest.approx(1.0) for step in steps), "divided by the whole's tokens"
    assert [call for call in calls if call[0] == 0.1] == [
        (0.1, f"p phase of iteration 3, step {index}") for index in range(6)
    ]
    assert {step.gradient_norm for step in steps} == {0.5}


def test_the_last_micro_batch_before_a_step_is_marked() -> None:
    _, calls = run(Tokens(), budget=1)
    assert calls[:3] == [("backward", False), ("backward", True), (0.1, calls[2][1])]


def test_an_objective_that_has_enough_ends_all_epochs() -> None:
    steps, calls = run(Tokens(most=4))
    assert len(steps) == 4 == sum(call[0] == 0.1 for call in calls)


def test_a_step_that_must_not_be_taken_is_not() -> None:
    with pytest.raises(TrainingError, match="no further"):
        run(Tokens(bad=0))


def test_a_loss_that_is_not_finite_stops_before_its_backward_pass() -> None:
    with pytest.raises(TrainingError, match="count became nan at p phase of iteration 3, step 0"):
        run(Tokens(value=float("nan")))
