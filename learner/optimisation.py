"""The one loop of optimisation: epochs, minibatches, micro-batches, and a step per minibatch.

What is optimised is an `Objective` (`learner.objectives`). All ranks run it together, each on its
share of the rows, and take the same number of steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import TrainingError
from common.metrics import require_finite
from learner.batch.experience import Sequences
from learner.batch.shards import MicroBatch, Shards
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum

_TOTAL = "total"
"""Name of the loss itself among what is added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often a phase goes over its batch, and in which steps."""

    phase: str
    """Its name in errors; the order of rows derives from it."""
    iteration: int
    epochs: int
    minibatches: int
    """Optimizer steps of one epoch."""
    lr: float


class Whole(NamedTuple):
    """A whole minibatch, over all ranks and micro-batches: what its losses are divided by."""

    tokens: float
    """Response tokens."""
    sequences: float
    """Responses."""


class Loss(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor
    """To differentiate, divided by the size of the whole minibatch."""
    sums: Mapping[str, Tensor]
    """What is added up over micro-batches and ranks, detached; the same names in all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is known of one optimizer step, the same on every rank."""

    epoch: int
    tokens: float
    """Response tokens that were computed, over all ranks: what `sums` are over."""
    loss: float
    sums: dict[str, float]
    """As `Loss.sums`, over all micro-batches and ranks."""
    gradient_norm: float
    """Before clipping."""


class Objective(ABC):
    """What an engine is optimised for."""

    name: str
    """Of its loss, in errors."""

    @abstractmethod
    def loss(self, micro: MicroBatch, whole: Whole) -> Loss:
        """Return the loss of a micro-batch.

        Args:
            micro: this rank's rows; its mask is empty in a filler.
            whole: size of the minibatch that it is a part of, to divide by.
        """

    def matters(self, rows: list[int]) -> list[int]:
        """Return those of a minibatch's rows that its gradient depends on; the others' is 0."""
        return rows

    def problem(self, steps: int, sums: Mapping[str, float]) -> str:
        """Say why the next step must not be taken; empty if it may.

        Args:
            steps: taken before it.
            sums: of the minibatch, as in `Step.sums`.
        """
        return ""

    def enough(self, step: Step) -> bool:
        """Whether the step just taken is the last one."""
        return False


def optimise(
    engine: ZeroEngine, objective: Objective, sequences: Sequences, shards: Shards, plan: Plan
) -> list[Step]:
    """Take a phase's optimizer steps (a collective).

    Raises:
        TrainingError: a loss or gradient is not finite, or the objective has a problem.
    """
    steps: list[Step] = []
    for epoch in range(plan.epochs):
        for rows in shards.minibatches(
            sequences, plan.minibatches, plan.phase, plan.iteration, epoch
        ):
            where = f"{plan.phase} phase of iteration {plan.iteration}, step {len(steps)}"
            whole = Whole(tokens=sequences.response_tokens(rows), sequences=float(len(rows)))
            computed = objective.matters(rows) or rows[:1]  # all ranks step together
            micro_batches = shards.micro_batches(sequences, computed)
            losses = ((objective.loss(micro, whole), micro.last) for micro in micro_batches)
            loss, sums = accumulate(engine, losses, objective.name, where)
            if problem := objective.problem(len(steps), sums):
                raise TrainingError(problem)
            norm = engine.step(plan.lr, where)
            tokens = sequences.response_tokens(computed)
            steps.append(Step(epoch=epoch, tokens=tokens, loss=loss, sums=sums, gradient_norm=norm))
            if objective.enough(steps[-1]):
                return steps
    return steps


def accumulate(
    engine: ZeroEngine, losses: Iterable[tuple[Loss, bool]], name: str, where: str
) -> tuple[float, dict[str, float]]:
    """Add up the gradients of one minibatch; its loss and sums over all ranks (a collective).

    They stay on the device until it was given all micro-batches: looked at one by one, it would
    stand still while the next is laid out.

    Args:
        engine: whose gradients they are.
        losses: of this rank's micro-batches, each computed as it is asked for, and whether it is
            the last.
        name: of the loss, for the error.
        where: phase and step, in words, for the error.

    Raises:
        TrainingError: a loss is not finite, on every rank.
    """
    sums = Sums()
    for loss, last in losses:
        engine.backward(loss.total, last=last)
        sums.add({_TOTAL: loss.total.detach(), **loss.sums})
    summed = sums.over_ranks()
    return require_finite(name, summed.pop(_TOTAL), where), summed


class Sums:
    """Sums over micro-batches in float64, on the device until they are asked for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add scalars; they have the same names in the same order every time."""
        more = torch.stack([number.double() for number in numbers.values()])
        self._names, self._sums = list(numbers), more if self._sums is None else self._sums + more

    def over_ranks(self) -> dict[str, float]:
        """Return the sums over all ranks (a collective): here the device is waited for."""
        assert self._sums is not None, "every rank has a micro-batch"
        summed = all_sum(self._sums.cpu())
        return dict(zip(self._names, summed.tolist(), strict=True))
