"""What a recipe needs against what the cluster has, in words, before anything waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import RunConfig
from common.errors import ClusterError, ConfigError
from common.palm import count_parameters

_BYTES_PER_TRAINED = 16
"""fp32 weights, gradients and two Adam moments."""
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Resources of one kind of worker."""

    what: str
    count: int
    cpus: float
    gpus: float
    gang: bool
    """All or nothing: the learner's placement group."""


def require_trainable(config: RunConfig) -> None:
    """Refuse to train from greedy samples, which evaluation may take.

    Raises:
        ConfigError: sampling leaves one token to choose from, so its log-probability is always 0
            and has no gradient.
    """
    rollout = config.rollout
    for field, greedy, mend in (
        ("temperature", rollout.temperature == 0, "above 0"),
        ("top_k", rollout.top_k == 1, "to 0 or above 1"),
        ("min_p", rollout.min_p == 1, "below 1"),
    ):
        if greedy:
            given = f"rollout.{field}={getattr(rollout, field):g}"
            raise ConfigError(
                f"{given} always takes the most probable token, so there is nothing to learn from: "
                f"set it {mend} for training; `talipot evaluate RUN {given}` may have it"
            )


def demands(config: RunConfig) -> list[Demand]:
    """Everything the recipe places."""
    learner, rollout, reward = config.learner, config.rollout, config.reward_service
    return [
        Demand(
            what="learner ranks",
            count=learner.ranks,
            cpus=learner.cpus_per_rank,
            gpus=learner.gpus_per_rank,
            gang=True,
        ),
        Demand(
            what="rollout actors",
            count=rollout.actors_at_start,
            cpus=rollout.cpus_per_actor,
            gpus=rollout.gpus_per_actor,
            gang=False,
        ),
        Demand(
            what="reward workers",
            count=reward.replicas,
            cpus=reward.cpus_per_replica,
            gpus=reward.gpus_per_replica,
            gang=False,
        ),
    ]


def learner_bytes(config: RunConfig) -> float:
    """Bytes of weights, gradients and optimizer states that one learner rank holds.

    Policy and (for PPO with a separate value network) value, under ZeRO: stage 1 shards the
    optimizer, 2 also gradients, 3 also weights.
    """
    vocabulary = config.model.vocab_size or config.tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    networks = 1 + (config.train.algorithm == "ppo" and config.train.value_network == "separate")
    parameters = count_parameters(model).total * networks
    ranks, stage = config.learner.ranks, config.learner.zero_stage
    weights = 4.0 / (ranks if stage >= 3 else 1)
    gradients = 4.0 / (ranks if stage >= 2 else 1)
    optimizer = (_BYTES_PER_TRAINED - 8.0) / (ranks if stage >= 1 else 1)
    return parameters * (weights + gradients + optimizer)


def explain(config: RunConfig, resources: Mapping[str, float]) -> list[str]:
    """One line per demand and the totals; pure, for any cluster's resources.

    Raises:
        ClusterError: the cluster cannot hold the recipe, saying what is short and the mend.
    """
    lines = []
    need_cpu = need_gpu = 0.0
    for demand in demands(config):
        cpu, gpu = demand.count * demand.cpus, demand.count * demand.gpus
        need_cpu, need_gpu = need_cpu + cpu, need_gpu + gpu
        together = ", all placed together" if demand.gang else ", placed one by one"
        gpus = f" and {gpu:g} GPU" if gpu else ""
        lines.append(f"{demand.count} {demand.what}: {cpu:g} CPU{gpus}{together}")
    have_cpu, have_gpu = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    memory = learner_bytes(config) / 2**30
    lines.append(
        f"each learner rank holds {memory:.2f} GiB of weights, gradients and optimizer states "
        f"(ZeRO {config.learner.zero_stage}), activations not counted"
    )
    lines.append(
        f"needed {need_cpu:g} CPU and {need_gpu:g} GPU; the cluster has {have_cpu:g} and "
        f"{have_gpu:g}"
    )
    for kind, need, have in (("CPU", need_cpu, have_cpu), ("GPU", need_gpu, have_gpu)):
        if need > have + _EPSILON:
            raise ClusterError(
                f"the recipe needs {need:g} {kind} and the cluster has {have:g}: "
                + "; ".join(lines[:-2])
                + f"; lower rollout.actors, or a {kind.lower()}s_per_* setting, or add nodes"
            )
    memory_have = resources.get("memory", 0.0) / 2**30
    total = memory * config.learner.ranks
    if memory_have and not need_gpu and total > memory_have:
        raise ClusterError(
            f"the learner needs {total:.1f} GiB and the cluster has {memory_have:.1f} GiB: raise "
            "learner.zero_stage or learner.ranks, or add nodes"
        )
    return lines
