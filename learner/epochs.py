"""Epochs of optimisation over a batch: the clipped policy objective, and value regression.

Both policy phase and auxiliary phase regress values; they call the same function.
Shape suffixes: N rows of the whole batch, B rows of a micro-batch, R response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.stages import TrainConfig
from common.logprobs import Sampling, chosen_reader
from common.metrics import Metrics, mean, require_finite
from learner.algorithms import ppo
from learner.batch.experience import Sequences
from learner.batch.shards import MicroBatch, Shards
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum

SHARED_VALUE_COEF = 0.1
"""Weight of the value loss, in units of values, when one network does both (Stiennon 2020,
implementation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the epochs of one policy phase optimise; frozen before the first step."""

    proximal_NR: Tensor
    """float32 logprobs at the start of the phase."""
    values_NR: Tensor
    """float32 values at the start of the phase (zeros without a value function)."""
    advantages_NR: Tensor
    """float32, whitened for PPO."""
    returns_NR: Tensor
    """float32 value targets."""
    value_unit: float
    """What values are measured in (`ppo.value_unit`)."""
    importance_NR: Tensor | None
    """float32 truncated proximal/behaviour weights; None where the two are the same policy in the
    same precision (`RunConfig.corrects_mismatch`)."""

    def value_clip(self, share: float | None) -> float | None:
        """How far values may move from `values_NR`; None: as far as they will."""
        return None if share is None else share * self.value_unit


def policy_epochs(
    engine: ZeroEngine,
    shards: Shards,
    sequences: Sequences,
    targets: Targets,
    train: TrainConfig,
    sampling: Sampling,
    *,
    lr: float,
    iteration: int,
) -> Metrics:
    """E_pi epochs of the clipped objective, left early once the policy has moved `stop_kl`.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    steps, norms, stopped = 0, 0.0, False
    for epoch in range(train.e_pi):
        for rows in shards.minibatches(
            len(sequences), train.minibatches, "policy", iteration, epoch
        ):
            where = f"policy phase of iteration {iteration}, step {steps}"
            normalizer = sequences.response_tokens(rows)
            sums = torch.zeros(4, dtype=torch.float64)
            for micro in shards.micro_batches(sequences, rows):
                loss, found = _policy_loss(engine, micro, targets, train, sampling, normalizer)
                require_finite("policy loss", float(loss.detach()), where)
                engine.backward(loss, last=micro.last)
                parts = [loss.detach(), found.clipped, found.k3, micro.mask_BR.sum()]
                sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
            norms += engine.step(lr, where)
            totals, steps = totals + all_sum(sums), steps + 1
            # The ranks agree: the sums are global.
            stopped = train.stop_kl is not None and bool(sums[2] / sums[3] > train.stop_kl)
            if stopped:
                break
        if stopped:
            break
    loss_sum, clipped, k3, tokens = totals.tolist()
    return {
        "policy_loss": mean(loss_sum, steps),
        "clip_fraction": mean(clipped, tokens),
        "update_kl": mean(k3, tokens),
        "gradient_norm": mean(norms, steps),
        "policy_steps": mean(steps, 1),
        "stopped_by_kl": mean(stopped, 1),
        "lr": mean(lr, 1),
    }


def _policy_loss(
    engine: ZeroEngine,
    micro: MicroBatch,
    targets: Targets,
    train: TrainConfig,
    sampling: Sampling,
    normalizer: float,
) -> tuple[Tensor, ppo.PolicyLoss]:
    """The loss of one micro-batch: clipped objective, entropy bonus, shared value loss."""
    data = micro.data
    read = chosen_reader(data.response_BR, sampling, ppo.entropy if train.entropy_coef else None)
    found_BRC, values_BR = engine(data.tokens_BT, predict_BR=data.predict_BR, read=read)
    weights = targets.importance_NR
    found = ppo.policy_loss(
        found_BRC[..., 0],
        micro.cut(targets.proximal_NR),
        micro.cut(targets.advantages_NR),
        micro.mask_BR,
        clip_range=train.clip_range,
        normalizer=normalizer,
        importance_weights_BR=None if weights is None else micro.cut(weights),
    )
    loss = found.loss
    if train.entropy_coef:
        entropy = (found_BRC[..., 1] * micro.mask_BR).sum() / normalizer
        loss = loss - train.entropy_coef * entropy
    if train.needs.values and not train.separate_values:
        value = ppo.value_loss(
            values_BR,
            micro.cut(targets.values_NR),
            micro.cut(targets.returns_NR),
            micro.mask_BR,
            value_clip_range=targets.value_clip(train.value_clip_range),
            normalizer=normalizer,
        )
        loss = loss + SHARED_VALUE_COEF / targets.value_unit**2 * value.loss
    return loss, found


def value_epochs(
    engine: ZeroEngine,
    forward: Callable[[MicroBatch], Tensor],
    shards: Shards,
    sequences: Sequences,
    returns_NR: Tensor,
    *,
    old_values_NR: Tensor | None,
    clip: float | None,
    epochs: int,
    minibatches: int,
    lr: float,
    purpose: str,
    iteration: int,
) -> Metrics:
    """Regress values on frozen returns; they move at most `clip` from `old_values_NR`, when those
    are given.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    steps = 0
    for epoch in range(epochs):
        for rows in shards.minibatches(len(sequences), minibatches, purpose, iteration, epoch):
            where = f"{purpose} phase of iteration {iteration}, step {steps}"
            normalizer = sequences.response_tokens(rows)
            for micro in shards.micro_batches(sequences, rows):
                values_BR = forward(micro)
                returns_BR = micro.cut(returns_NR)
                old = values_BR.detach() if old_values_NR is None else micro.cut(old_values_NR)
                found = ppo.value_loss(
                    values_BR,
                    old,
                    returns_BR,
                    micro.mask_BR,
                    value_clip_range=None if old_values_NR is None else clip,
                    normalizer=normalizer,
                )
                require_finite("value loss", float(found.loss.detach()), where)
                engine.backward(found.loss, last=micro.last)
                totals += torch.tensor([float(found.loss.detach()), float(found.clipped)])
            engine.step(lr, where)
            steps += 1
    loss_sum, clipped = all_sum(totals).tolist()
    tokens = sequences.response_tokens(range(len(sequences))) * epochs
    return {"value_loss": mean(loss_sum, steps), "value_clip_fraction": mean(clipped, tokens)}
