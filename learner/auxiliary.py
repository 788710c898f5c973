"""The auxiliary phase of phasic policy gradient (Cobbe 2020, algorithm 1) on ZeRO.

Per epoch over the whole memory: the joint loss of `learner.algorithms.ppg` on the policy network,
and the value loss on the value network. V_targ are those of the policy phase; pi_old is a frozen
copy of the policy as it is when the phase starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from common.config.model import ModelConfig
from common.config.stages import PpgConfig
from common.errors import TrainingError
from common.metrics import Metrics, mean, require_finite
from common.models.adapters import adapter_tensors, drop_adapter, snapshot_adapter
from common.models.build import build_policy
from common.models.networks import PolicyNetwork, compute_in
from learner.algorithms import ppg
from learner.batch.memory import AuxiliaryMemory
from learner.batch.shards import Shards
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum

Policy = Callable[..., tuple[Any, Any]]
_OLD = "old"


def joint_epochs(
    engine: ZeroEngine,
    shards: Shards,
    memory: AuxiliaryMemory,
    settings: PpgConfig,
    model: ModelConfig,
    *,
    lr: float,
    iteration: int,
) -> Metrics:
    """E_aux epochs of the joint loss on the policy network.

    Raises:
        TrainingError: a loss is not finite, or KL(pi_old, pi) is not 0 before the first step.
    """
    with _frozen_policy(engine, model) as old:
        return _epochs(engine, old, shards, memory, settings, lr=lr, iteration=iteration)


def _epochs(
    engine: ZeroEngine,
    old: Policy,
    shards: Shards,
    memory: AuxiliaryMemory,
    settings: PpgConfig,
    *,
    lr: float,
    iteration: int,
) -> Metrics:
    sequences, targets_NR, unit = memory.sequences, memory.targets_NR, memory.value_unit
    parts = settings.minibatches * memory.iterations
    metrics: Metrics = {}
    step = 0
    for epoch in range(settings.e_aux):
        totals, tokens = torch.zeros(2, dtype=torch.float64), 0.0
        for rows in shards.minibatches(len(memory), parts, "auxiliary", iteration, epoch):
            where = f"auxiliary phase of iteration {iteration}, step {step}"
            normalizer = sequences.response_tokens(rows)
            sums = torch.zeros(2, dtype=torch.float64)
            for micro in shards.micro_batches(sequences, rows):
                data = micro.data
                with torch.no_grad():
                    old_logits_BRV, _ = old(data.tokens_BT, predict_BR=data.predict_BR)
                logits_BRV, values_BR = engine(data.tokens_BT, predict_BR=data.predict_BR)
                found = ppg.joint_loss(
                    values_BR,
                    micro.cut(targets_NR),
                    old_logits_BRV,
                    logits_BRV,
                    micro.mask_BR,
                    beta_clone=settings.beta_clone,
                    normalizer=normalizer,
                    value_unit=unit,
                )
                require_finite("auxiliary loss", float(found.total.detach()), where)
                engine.backward(found.total, last=micro.last)
                sums += torch.tensor([float(found.aux_value), float(found.clone_kl)])
            all_sum(sums)
            if step == 0:
                _require_same_policy(float(sums[1]), engine)
                metrics["auxiliary/clone_kl_first"] = mean(float(sums[1]), 1)
            engine.step(lr, where)
            totals, tokens, step = totals + sums * normalizer, tokens + normalizer, step + 1
        metrics["auxiliary/value_loss"] = mean(float(totals[0]), tokens)
        metrics["auxiliary/clone_kl"] = mean(float(totals[1]), tokens)
    return metrics


def _require_same_policy(kl: float, engine: ZeroEngine) -> None:
    """Invariant I8. In bf16 both forwards round alike, so it holds there too."""
    if kl != 0.0:
        raise TrainingError(
            f"KL(pi_old, pi) is {kl} before the first auxiliary step (ZeRO {engine.zero_stage}); "
            "pi_old is not the policy"
        )


@contextmanager
def _frozen_policy(engine: ZeroEngine, model: ModelConfig) -> Iterator[Policy]:
    """The policy as it is now: a copy of its adapter, or of all of it where it has none."""
    network = engine.network
    assert isinstance(network, PolicyNetwork)
    if not network.adapter:
        yield _copy(engine, model)
        return
    with engine.gathered([t for _, t in adapter_tensors(network, network.adapter)]):
        snapshot_adapter(network, network.adapter, _OLD)
    try:
        yield partial(engine, adapter=_OLD)
    finally:
        drop_adapter(network, _OLD)


def _copy(engine: ZeroEngine, model: ModelConfig) -> PolicyNetwork:
    """On this rank, whole whatever the ZeRO stage."""
    old = build_policy(model)
    if engine.zero_stage < 3:
        old.load_state_dict(copy.deepcopy(engine.network.state_dict()))
    else:
        old.load_state_dict(engine.full_state())
    old.to(engine.device).eval().requires_grad_(False)
    if engine.precision == "bf16":
        compute_in(old, torch.bfloat16)
    return old
