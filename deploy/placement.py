"""Where resources are placed: the Ray cluster, and plain worker classes turned into Ray actors."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ray

from actors.rollout_actor import RolloutActor
from common.config import RunConfig
from common.errors import ClusterError
from common.logprobs import Sampling
from deploy.pool import MakeWorker, Pool
from reward_service.service import RewardWorker

NAMESPACE = "talipot"


def start_cluster(config: RunConfig) -> str:
    """Join the cluster that was named, or start one on this machine; returns its dashboard's URL.

    Raises:
        ClusterError: the address does not answer, or the local cluster cannot start.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # Ray announces a change of a later version in every worker; it says nothing to our users.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "ignore_reinit_error": True,
    }
    try:
        if address:
            context = ray.init(address=address, **common)
        else:
            context = ray.init(include_dashboard=config.cluster.dashboard, **common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"cluster at {address}" if address else "local cluster"
        raise ClusterError(
            f"{where} cannot be reached: {str(error).splitlines()[0]}; "
            "check --address, or leave it out to start one here"
        ) from None
    url = context.dashboard_url
    return f"http://{url}" if url else ""


def sampling_of(config: RunConfig) -> Sampling:
    """The sampling distribution of the rollouts."""
    rollout = config.rollout
    return Sampling(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k)


def rollout_pool(config: RunConfig, run: str, tokenizer: Path) -> Pool:
    """Rollout actors; elastic, outside any placement group."""
    settings = config.rollout

    def make(name: str) -> Any:
        options: dict[str, Any] = {
            "name": f"{run}:{name}",
            "num_cpus": settings.cpus_per_actor,
            "num_gpus": settings.gpus_per_actor,
        }
        return (
            ray.remote(RolloutActor)
            .options(**options)
            .remote(
                name,
                config.model,
                str(tokenizer),
                sampling_of(config),
                settings.max_response_tokens,
                max(1, int(settings.cpus_per_actor)),
            )
        )

    return _pool("rollout", make, settings.actors, config)


def reward_pool(config: RunConfig, run: str, reference: Path, reward_model: Path | None) -> Pool:
    """Reward workers; elastic, outside any placement group."""
    settings = config.reward_service

    def make(name: str) -> Any:
        options: dict[str, Any] = {
            "name": f"{run}:{name}",
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
        }
        return (
            ray.remote(RewardWorker)
            .options(**options)
            .remote(
                settings,
                config.model,
                str(reference),
                str(reward_model) if reward_model else None,
                sampling_of(config),
                max(1, int(settings.cpus_per_replica)),
                merge=config.train.max_staleness > 0,
            )
        )

    return _pool("reward", make, settings.replicas, config)


def _pool(kind: str, make: MakeWorker, size: int, config: RunConfig) -> Pool:
    pool = Pool(kind=kind, make=make, max_failures=config.cluster.max_restarts)
    pool.scale(size)
    return pool
