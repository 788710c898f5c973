"""Regression of values on their targets: in policy phases clipped, in auxiliary phases not.

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, T positions, R response
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.devices import onto
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from learner.algorithms import ppo
from learner.batch.shards import MicroBatch
from learner.optimisation import Loss, Objective, Step, Whole
from learner.zero.engine import ZeroEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What values are to become; frozen before the first step."""

    returns_NR: Tensor
    """float32 V_targ."""
    old_values_NR: Tensor | None = None
    """float32 values at the start of the phase, which the clip is around; None without a clip."""
    unit: float = 1.0
    """What values are measured in (`ppo.value_unit`)."""
    clip_range: float | None = None
    """How far values may move from the old ones without losing their gradient; None: any way."""

    def loss(self, values_BR: Tensor, micro: MicroBatch, tokens: float) -> ppo.ValueLoss:
        """Return the value loss of a micro-batch."""
        old_NR = self.old_values_NR
        return ppo.value_loss(
            values_BR,
            values_BR.detach() if old_NR is None else micro.cut(old_NR),
            micro.cut(self.returns_NR),
            micro.mask_BR,
            value_clip_range=self.clip_range,
            normalizer=tokens,
        )


@dataclass(frozen=True, slots=True)
class ValueObjective(Objective):
    """The value loss of a network that does nothing else."""

    engine: ZeroEngine
    targets: ValueTargets
    name: str = "value loss"

    def loss(self, micro: MicroBatch, whole: Whole) -> Loss:
        """Return the value loss of a micro-batch."""
        value = self.targets.loss(values_at(self.engine, micro), micro, whole.tokens)
        return Loss(value.loss, {"clipped": value.clipped})


def values_at(engine: ZeroEngine, micro: MicroBatch) -> Tensor:
    """Return the value network's values of the states that tokens were sampled in, ``[B, R]``."""
    data = micro.data
    values_BT: Tensor = engine(data.tokens_BT, lengths_B=data.lengths_B, prompts_B=data.prompts_B)
    return values_BT.gather(1, onto(data.predict_BR.clamp(min=0), values_BT.device))


def value_metrics(steps: Sequence[Step]) -> Metrics:
    """Return what a policy phase reports of its value steps."""
    return {
        Logged.VALUE_LOSS: mean(sum(step.loss for step in steps), len(steps)),
        Logged.VALUE_CLIP_FRACTION: mean(
            sum(step.sums["clipped"] for step in steps), sum(step.tokens for step in steps)
        ),
    }
