"""Where resources are placed: the Ray cluster, and plain worker classes turned into Ray actors."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.rollout_actor import RolloutActor
from common.config import RunConfig
from common.errors import ClusterError
from common.logprobs import sampling_of
from common.tokenizer import Tokenizer
from deploy.pool import MakeWorker, Pool
from reward_service.service import RewardWorker

NAMESPACE = "talipot"
_ANSWER_S = 10.0


def start_cluster(config: RunConfig) -> str:
    """Join the cluster that was named, or start one on this machine; returns its dashboard's URL.

    Raises:
        ClusterError: the address does not answer, or the local cluster cannot start.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        _require_answer(address)
    # Ray announces a change of a later version in every worker; it says nothing to our users.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "ignore_reinit_error": True,
    }
    try:
        with _kept_signal_handlers():
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


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Ray's start replaces the handler of SIGTERM by one that aborts the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_answer(address: str) -> None:
    """Knock first: Ray itself tries for minutes where nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and "local" name no port
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"cluster at {address} does not answer ({error}); "
            "check --address and RAY_ADDRESS, or leave both out to start one here"
        ) from None


def rollout_pool(config: RunConfig, run: str, tokenizer: Path, *, start: bool = True) -> Pool:
    """Rollout actors; elastic, outside any placement group.

    With `start` False the pool is empty: whoever scales it up owns the workers.
    """
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
                settings,
                max(1, int(settings.cpus_per_actor)),
            )
        )

    return _pool("rollout", make, settings.actors if start else 0, config)


def reward_pool(
    config: RunConfig,
    run: str,
    tokenizer: Path,
    reference: Path,
    reward_model: Path | None,
    *,
    start: bool = True,
) -> Pool:
    """Reward workers; elastic, outside any placement group. `start` as in `rollout_pool`."""
    settings = config.reward_service
    sampling = sampling_of(config.rollout, Tokenizer.load(tokenizer).eos_id)

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
                sampling,
                max(1, int(settings.cpus_per_replica)),
                merge=config.train.max_staleness > 0,
            )
        )

    return _pool("reward", make, settings.replicas if start else 0, config)


def _pool(kind: str, make: MakeWorker, size: int, config: RunConfig) -> Pool:
    pool = Pool(kind=kind, make=make, max_failures=config.cluster.max_restarts)
    pool.scale(size)
    return pool
