"""The joint loss of phasic policy gradient's auxiliary phase (Cobbe 2020, algorithm 1).

V_targ are those of the policy phases; pi_old is a frozen copy of the policy as it is when the
phase begins. Both distributions are whole and read in pieces of `ModelConfig.logits_mb`, of which
pi_old keeps the states alone.

Shape suffixes: N rows of the memory or positions of a micro-batch, B rows of a micro-batch,
R response positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.config.model import ModelConfig
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from common.models.adapters import adapter_tensors, drop_adapter, snapshot_adapter
from common.models.build import build_decoder, build_policy
from common.models.embedding import Part, output_head
from common.models.networks import PolicyNetwork, compute_in
from learner.algorithms import ppg
from learner.batch.shards import MicroBatch
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
    logits: Callable[[Tensor], Tensor]
    """As `Decoder.logits`, at any time: also while the network that is trained computes."""


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
        old_ND = old_BRD.flatten(0, 1)

        def read(logits: Tensor, part: Part) -> Tensor:
            with torch.no_grad():
                old_logits = self.old.logits(old_ND[part])
            return ppg.clone_kl(old_logits, logits)[:, None]

        kl_BR1, values_BR = self.engine(
            data.tokens_BT,
            lengths_B=data.lengths_B,
            prompts_B=data.prompts_B,
            predict_BR=data.predict_BR,
            read=read,
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
        old = _copy(engine, model)
        yield FrozenPolicy(run=old, logits=old.decoder.logits)
        return
    with engine.gathered([t for _, t in adapter_tensors(network, network.adapter)]):
        snapshot_adapter(network, network.adapter, _OLD)
    try:
        yield FrozenPolicy(run=partial(engine, adapter=_OLD), logits=_frozen_head(engine, model))
    finally:
        drop_adapter(network, _OLD)


def _frozen_head(engine: ZeroEngine, model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Return what makes logits where adapters are trained; no adapter is on an output head.

    Under ZeRO 3 the network's own head is whole only while its module computes, which is when the
    old logits are made too: this rank then keeps a copy of it.
    """
    network = engine.network
    assert isinstance(network, PolicyNetwork)
    if engine.zero_stage < 3:
        return network.decoder.logits
    with torch.device("meta"):
        shell = build_decoder(model)
    own, head = output_head(network.decoder), output_head(shell)
    with engine.gathered(list(own.parameters(recurse=False))):
        for name, parameter in own.named_parameters(recurse=False):
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(head, name, copied)
    head.precision = own.precision
    return shell.logits


def _copy(engine: ZeroEngine, model: ModelConfig) -> PolicyNetwork:
    """Copy the policy, sharded as it is; its head is whole on every rank, as in `_frozen_head`.

    Ranks read logits in different numbers of pieces, so none could wait for the others there.
    """
    with torch.device("meta"):
        old = build_policy(model)
    old.eval().requires_grad_(False)
    if engine.precision == "bf16":
        compute_in(old, torch.bfloat16)
    fill(old, engine, whole=[output_head(old.decoder)])
    return old
