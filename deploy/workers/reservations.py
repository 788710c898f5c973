"""How many cores each worker reserves, where the recipe leaves it open.

One core each where the cluster has so many, as on a cluster for the purpose. On a smaller machine
workers take turns on its cores: each reserves a fraction, so small that as many again may be added.
"""

from __future__ import annotations

from dataclasses import dataclass

import ray

from common.config.run import RunConfig

_STEP = 1000
"""Fractions are multiples of a thousandth: Ray counts in ten-thousandths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservations:
    """Cores that one worker of each kind reserves."""

    rank: float
    actor: float
    replica: float
    shared: float | None
    """The fraction where there is one."""


def reservations(config: RunConfig, cores: float) -> Reservations:
    """Return what each worker reserves on a cluster of so many cores; explicit values are kept."""
    learner, rollout, service = config.learner, config.rollout, config.reward_service
    actors = rollout.actors if isinstance(rollout.actors, int) else rollout.actors.max
    kinds = (
        (learner.ranks, learner.cpus_per_rank),
        (actors, rollout.cpus_per_actor),
        (service.replicas, service.cpus_per_replica),
    )
    left = cores - sum(count * cpus for count, cpus in kinds if cpus is not None)
    open_ = sum(count for count, cpus in kinds if cpus is None)
    share = 1.0
    # A cluster that grows is asked for whole cores; one that is full refuses the recipe.
    if not config.cluster.autoscales and 0 < left < open_:
        share = max(1, int(left / open_ / 2 * _STEP)) / _STEP
    rank, actor, replica = (share if cpus is None else cpus for _, cpus in kinds)
    shared = share if share < 1 else None
    return Reservations(rank=rank, actor=actor, replica=replica, shared=shared)


def reserved(config: RunConfig) -> Reservations:
    """Return what each worker reserves on the cluster that this process is in."""
    return reservations(config, float(ray.cluster_resources().get("CPU", 0.0)))
