"""What a recipe needs against what the cluster has, in words, before anything waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from common.config.run import RunConfig
from common.devices import torch_dtype
from common.errors import ClusterError, ConfigError
from common.models.adapters import adapter_size
from common.models.build import build_decoder, count_parameters
from common.out_of_memory import in_words
from deploy.workers.attach import named_address
from deploy.workers.reservations import reservations
from reward_service.targets import require_targets

_BYTES_OF_A_NUMBER = 4.0
"""What is trained is fp32, with its gradient and each of AdamW's two moments."""
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
    for field, greedy, remedy in (
        ("temperature", rollout.temperature == 0, "above 0"),
        ("top_k", rollout.top_k == 1, "to 0 or above 1"),
        ("min_p", rollout.min_p == 1, "below 1"),
    ):
        if greedy:
            given = f"rollout.{field}={getattr(rollout, field):g}"
            raise ConfigError(
                f"{given} always takes the most probable token, so there is nothing to learn from: "
                f"set it {remedy} for training; `talipot evaluate RUN {given}` may have it"
            )


def require_scorers(config: RunConfig) -> None:
    """Refuse a score whose functions or endpoints no worker could ask; no worker is started.

    Raises:
        ConfigError: a function that is not there, a URL that is none, a token that is not set. What
            workers of a cluster that is named find in their environment, only they can tell.
    """
    require_targets(config.reward_service.components, here=named_address(config) is None)


def demands(config: RunConfig, cores: float) -> list[Demand]:
    """Return all that the recipe places on a cluster of so many cores."""
    each = reservations(config, cores)
    learner, rollout, reward = config.learner, config.rollout, config.reward_service
    return [
        Demand(
            what="learner ranks",
            count=learner.ranks,
            cpus=each.rank,
            gpus=learner.gpus_per_rank,
            gang=True,
        ),
        Demand(
            what="rollout actors",
            count=rollout.actors_at_start,
            cpus=each.actor,
            gpus=rollout.gpus_per_actor,
            gang=False,
        ),
        Demand(
            what="reward workers",
            count=reward.replicas,
            cpus=each.replica,
            gpus=reward.gpus_per_replica,
            gang=False,
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSizes:
    """How many numbers policy training keeps of its networks, over all ranks."""

    trained: int
    """Numbers that are trained."""
    policy: int
    """Those of them that are the policy's."""
    frozen: int
    """Numbers of bases that adapters are trained on."""
    frozen_bytes: float
    """Bytes of each of these: rounded when products run in bf16."""


def network_sizes(config: RunConfig) -> NetworkSizes:
    """Count the policy, and for PPO with a separate value network that too.

    With LoRA it is their adapters, and their bases, which are one where they can be. Scalar heads
    are too small to count.
    """
    vocabulary = config.model.vocab_size or config.tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    whole, train = count_parameters(model).total, config.train
    separate = train.separate_values
    critic = whole if train.critic is None else count_parameters(train.critic).total
    if train.lora is None:
        return NetworkSizes(
            trained=whole + separate * critic,
            policy=whole,
            frozen=0,
            frozen_bytes=_BYTES_OF_A_NUMBER,
        )
    scored, theirs = config.reward_service.needs_model, config.reward_model.lora
    adapted = theirs if scored and train.critic is None else None
    with torch.device("meta"):
        decoder = build_decoder(model)
        own = decoder if train.critic is None else build_decoder(train.critic)
    policy = adapter_size(decoder, train.lora)
    # The value network goes on from a reward model of whole weights on a base of its own.
    apart = train.critic is not None or (scored and adapted is None)
    return NetworkSizes(
        trained=policy + separate * adapter_size(own, adapted or train.lora),
        policy=policy,
        frozen=whole + (separate and apart) * critic,
        frozen_bytes=torch_dtype(config.learner.precision).itemsize,
    )


def learner_bytes(config: RunConfig, sizes: NetworkSizes | None = None) -> float:
    """Return the bytes of weights, gradients and optimizer states of one learner rank.

    Under ZeRO stage 1 shards the optimizer, 2 also gradients, 3 also weights.

    Args:
        config: the run's.
        sizes: of the networks; None: those of policy training.
    """
    sizes = sizes or network_sizes(config)
    ranks, stage = config.learner.ranks, config.learner.zero_stage
    weights = _BYTES_OF_A_NUMBER / (ranks if stage >= 3 else 1)
    gradients = _BYTES_OF_A_NUMBER / (ranks if stage >= 2 else 1)
    moments = 2 * _BYTES_OF_A_NUMBER / (ranks if stage >= 1 else 1)
    frozen = sizes.frozen * sizes.frozen_bytes / (ranks if stage >= 3 else 1)
    return sizes.trained * (weights + gradients + moments) + frozen


def extra_bytes(config: RunConfig) -> float:
    """Return the bytes that one rank holds beside those.

    They are DeepSpeed's flat copy of a rank's share of the weights (ZeRO 1 to 3), and for an
    auxiliary phase moments of its own and a frozen policy, of which a rank has its share under
    ZeRO 3.
    """
    sizes, learner = network_sizes(config), config.learner
    ranks = learner.ranks if learner.zero_stage >= 1 else 1
    copies = _BYTES_OF_A_NUMBER * sizes.trained / ranks if learner.zero_stage >= 1 else 0.0
    if config.train.ppg is None:
        return copies
    moments = 2 * _BYTES_OF_A_NUMBER * sizes.trained / ranks
    # Of an adapter a copy as it is; a whole policy is rounded when products run in bf16.
    rounded = torch_dtype(learner.precision).itemsize
    shared = learner.ranks if learner.zero_stage >= 3 else 1
    if config.train.lora is not None:
        return copies + moments + sizes.policy * _BYTES_OF_A_NUMBER
    return copies + moments + sizes.policy * rounded / shared


def snapshot_bytes(config: RunConfig) -> float:
    """Return the bytes of what one rank copies of its state, to write it beside training."""
    sizes, phases = network_sizes(config), 1 if config.train.ppg is None else 2
    return _BYTES_OF_A_NUMBER * (1 + 2 * phases) * sizes.trained / config.learner.ranks


def explain(config: RunConfig, resources: Mapping[str, float], *, sized: bool = True) -> list[str]:
    """Explain each demand in a line, and the totals; pure, for any cluster's resources.

    Args:
        config: the run's.
        resources: of the cluster.
        sized: False leaves memory out, of a model that is not there yet.

    Raises:
        ClusterError: the cluster cannot hold the recipe; says what is short and what to change.
    """
    lines = []
    need_cpu = need_gpu = 0.0
    for demand in demands(config, resources.get("CPU", 0.0)):
        cpu, gpu = demand.count * demand.cpus, demand.count * demand.gpus
        need_cpu, need_gpu = need_cpu + cpu, need_gpu + gpu
        together = ", all placed together" if demand.gang else ", placed one by one"
        gpus = f" and {gpu:g} GPU" if gpu else ""
        lines.append(f"{demand.count} {demand.what}: {cpu:g} CPU{gpus}{together}")
    have_cpu, have_gpu = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    held = 0.0
    if sized:
        states, extra = learner_bytes(config), extra_bytes(config)
        held = (states + extra) * config.learner.ranks
        lines.append(
            f"each learner rank holds {in_words(states)} of weights, gradients and optimizer "
            f"states (ZeRO {config.learner.zero_stage}) and {in_words(extra)} of copies and of the "
            "auxiliary phase"
        )
    lines.append(
        f"needed {need_cpu:g} CPU and {need_gpu:g} GPU; the cluster has {have_cpu:g} and "
        f"{have_gpu:g}"
    )
    for kind, need, have in (("CPU", need_cpu, have_cpu), ("GPU", need_gpu, have_gpu)):
        if need > have + _EPSILON:
            raise ClusterError(
                f"the recipe needs {need:g} {kind} and the cluster has {have:g}: "
                + "; ".join(lines[: len(demands(config, have_cpu))])
                + f"; lower rollout.actors, or a {kind.lower()}s_per_* setting, or add nodes"
            )
    memory = resources.get("memory", 0.0)
    if memory and not need_gpu and held > memory:
        raise ClusterError(
            f"the learner needs {in_words(held)} and the cluster has {in_words(memory)}: raise "
            "learner.zero_stage or learner.ranks, train adapters (train.lora), or add nodes"
        )
    return lines


def sharing(config: RunConfig, cores: float) -> str:
    """Say that workers take turns on the cluster's cores; empty where each has its own."""
    share = reservations(config, cores).shared
    if share is None:
        return ""
    workers = sum(demand.count for demand in demands(config, cores))
    return (
        f"{workers} workers take turns on {cores:g} cores and reserve {share:g} of one each "
        "(cpus_per_* say otherwise)"
    )
