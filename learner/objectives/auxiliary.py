"""The joint loss of phasic policy gradient's auxiliary phase (Cobbe 2020, algorithm 1).

V_targ are those of the policy phases; pi_old is a frozen copy of the policy as it is when the
phase begins. Both distributions are whole and read in pieces (`learner.objectives.clone_kl`), of
which pi_old keeps the states alone.

Shape suffixes: N rows of the memory, B rows of a micro-batch, R response positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.config.model import ModelConfig
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from common.models.adapters import adapter_tensors, drop_adapter, snapshot_adapter
from common.models.build import build_policy
from common.models.embedding import HeadRows, output_head
from common.models.networks import PolicyNetwork, compute_in
from learner.algorithms import ppg
from learner.batch.shards import MicroBatch
from learner.objectives.clone_kl import ClonedFrom
from learner.optimisation import Loss, Objective, Step, Whole
from learner.zero.engine import ZeroEngine
from learner.zero.frozen import fill

_OLD = "old"
"""Name of the frozen copy of an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenPolicy:
    """pi_old, in the two steps in which it is read."""

    run: Callable[..., tuple[Any, Any]]
    """As `PolicyNetwork.forward`."""
    head: Callable[[], HeadRows] | None
    """Its output head, at any time: also while the network that is trained computes. None: it is
    that one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointObjective(Objective):
    """L_joint of the policy network: auxiliary values, and staying the policy that it was."""

    engine: ZeroEngine
    old: FrozenPolicy
    """pi_old."""
    targets_NR: Tensor
    """float32 V_targ."""
    value_unit: float
    """What values are measured in (`ppo.value_unit`)."""
    beta_clone: float
    name: str = "auxiliary loss"

    def loss(self, micro: MicroBatch, whole: Whole) -> Loss:
        """Return the loss of a micro-batch."""
        data = micro.data
        with torch.no_grad():
            old_BRD, _ = self.old.run(
                data.tokens_BT,
                lengths_B=data.lengths_B,
                prompts_B=data.prompts_B,
                predict_BR=data.predict_BR,
                states=True,
            )
        kl_BR1, values_BR = self.engine(
            data.tokens_BT,
            lengths_B=data.lengths_B,
            prompts_B=data.prompts_B,
            predict_BR=data.predict_BR,
            read=ClonedFrom(old_BRD.flatten(0, 1), self.old.head),
        )
        joint = ppg.joint_loss(
            values_BR,
            micro.cut(self.targets_NR),
            kl_BR1.squeeze(-1),
            micro.mask_BR,
            beta_clone=self.beta_clone,
            normalizer=whole.tokens,
            value_unit=self.value_unit,
        )
        return Loss(joint.total, {"aux_value": joint.aux_value, "clone_kl": joint.clone_kl})

    def problem(self, steps: int, sums: Mapping[str, float]) -> str:
        """Refuse a first step before which KL(pi_old, pi) is not exactly 0 (invariant I8).

        In bf16 both forward passes round alike, so it is 0 there too.
        """
        if steps or sums["clone_kl"] == 0.0:
            return ""
        return (
            f"KL(pi_old, pi) is {sums['clone_kl']} before the first auxiliary step (ZeRO "
            f"{self.engine.zero_stage}); pi_old is not the policy"
        )


def auxiliary_metrics(steps: Sequence[Step]) -> Metrics:
    """Return what an auxiliary phase reports of the policy's steps: means of its last epoch."""
    last = [step for step in steps if step.epoch == steps[-1].epoch]
    tokens = sum(step.tokens for step in last)
    return {
        Logged.AUXILIARY_CLONE_KL_FIRST: mean(steps[0].sums["clone_kl"], 1),
        Logged.AUXILIARY_VALUE_LOSS: mean(
            sum(s.sums["aux_value"] * s.tokens for s in last), tokens
        ),
        Logged.AUXILIARY_CLONE_KL: mean(sum(s.sums["clone_kl"] * s.tokens for s in last), tokens),
    }


@contextmanager
def frozen_policy(engine: ZeroEngine, model: ModelConfig) -> Iterator[FrozenPolicy]:
    """Copy the policy as it is now: its adapter, or all of it where it has none."""
    network = engine.network
    assert isinstance(network, PolicyNetwork)
    if not network.adapter:
        yield _copy(engine, model)
        return
    with engine.gathered([t for _, t in adapter_tensors(network, network.adapter)]):
        snapshot_adapter(network, network.adapter, _OLD)
    try:
        # No adapter is on an output head.
        yield FrozenPolicy(run=partial(engine, adapter=_OLD), head=None)
    finally:
        drop_adapter(network, _OLD)


def _copy(engine: ZeroEngine, model: ModelConfig) -> FrozenPolicy:
    """Copy the policy, sharded as it is."""
    with torch.device("meta"):
        old = build_policy(model)
    old.eval().requires_grad_(False)
    if engine.precision == "bf16":
        compute_in(old, torch.bfloat16)
    return FrozenPolicy(run=old, head=fill(old, engine, output_head(old.decoder)))
