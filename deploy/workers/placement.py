"""Where resources are placed: plain worker classes turned into Ray actors.

What Ray has no public way to ask (which nodes are draining, why an actor has not started) is asked
here and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors as ray_actors
from ray._private.state import state
from ray.autoscaler.sdk import request_resources

from actors.generation.decoder_generator import AdapterOnWire, DecoderGenerator
from actors.generation.interface import Generator
from common.config.rewards import FunctionComponent
from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.devices import Compute, compute_of
from common.logprobs import sampling_of
from deploy.workers.calls import Handle, actor_name
from deploy.workers.hosted import RewardWorker, RolloutActor
from deploy.workers.pool import Pool
from deploy.workers.reservations import reservations, reserved
from deploy.workers.told import Identity
from deploy.workers.worker import ClusterQueries, MakeWorker

NAMESPACE = "talipot"
_NO_HURRY_S = 86_400.0


def rollout_pool(
    config: RunConfig, run: str, tokenizer: Path, base: Path, *, start: bool = True
) -> Pool:
    """Return a pool of rollout actors; elastic, outside any placement group.

    With `start` False the pool is empty: whoever scales it up owns the workers.
    """
    settings, lora = config.rollout, config.train.lora
    adapted = AdapterOnWire(name=config.train.adapter, lora=lora, base=str(base)) if lora else None
    cpus = reserved(config).actor
    compute = compute_of(
        cpus=cpus,
        gpus=settings.gpus_per_actor,
        threads=settings.threads,
        frugal=config.pretrained,
    )
    build: Callable[[Compute], Generator] = partial(
        DecoderGenerator, config.model, str(tokenizer), settings, adapted
    )
    options = _options(cpus, settings.gpus_per_actor, settings.labels)
    label = config.run_dir.name

    def make(name: str) -> Handle:
        return (
            ray.remote(RolloutActor)
            .options(**actor_name(run, name), **options)
            .remote(Identity(run=label, role="rollout", worker=name), name, build, compute)
        )

    return _pool("rollout", make, settings.actors_at_start if start else 0, config, options)


def reward_pool(
    config: RunConfig,
    run: str,
    tokenizer: Path,
    reference: Path,
    reward_model: Path | None,
    *,
    start: bool = True,
) -> Pool:
    """Return a pool of reward workers, as `rollout_pool` does of actors."""
    settings = config.reward_service
    sampling = sampling_of(config.rollout, load_tokenizer(tokenizer).stop_ids)
    cpus = reserved(config).replica
    compute = compute_of(
        cpus=cpus,
        gpus=settings.gpus_per_replica,
        threads=settings.threads,
        frugal=config.pretrained,
    )
    options = _options(cpus, settings.gpus_per_replica, settings.labels)
    label = config.run_dir.name

    def make(name: str) -> Handle:
        return (
            ray.remote(RewardWorker)
            .options(**actor_name(run, name), **options)
            .remote(
                Identity(run=label, role="reward", worker=name),
                settings,
                config.model,
                str(reference),
                str(reward_model) if reward_model else None,
                sampling,
                compute,
                merge=config.train.max_staleness > 0,
                judge=config.reward_model.model,
                precision=config.reward_precision,
            )
        )

    pool = _pool("reward", make, settings.replicas if start else 0, config, options)
    components = settings.components.values()
    functions = [each.target for each in components if isinstance(each, FunctionComponent)]
    if functions:
        pool.hint = (
            f"; {', '.join(functions)} runs in these workers, and os._exit or a crash of native "
            "code in it ends them"
        )
    return pool


def request_room(config: RunConfig, actors: int, replicas: int) -> None:
    """Ask an autoscaling cluster for room for the learner and so many elastic workers.

    The request stands until the next one, so fewer workers let nodes go.
    """
    bundles, selectors = room(config, actors, replicas)
    request_resources(bundles=bundles, bundle_label_selectors=selectors)


def release_room() -> None:
    """Take the standing request back."""
    request_resources(bundles=[])


def room(
    config: RunConfig, actors: int, replicas: int
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Return resources and labels of every worker, one bundle each."""
    learner, rollout, reward = config.learner, config.rollout, config.reward_service
    each = reservations(config, math.inf)  # of a cluster that grows
    bundles: list[dict[str, float]] = []
    selectors: list[dict[str, str]] = []
    for count, cpus, gpus, labels in (
        (learner.ranks, each.rank, learner.gpus_per_rank, learner.labels),
        (actors, each.actor, rollout.gpus_per_actor, rollout.labels),
        (replicas, each.replica, reward.gpus_per_replica, reward.labels),
    ):
        bundles += [{"CPU": cpus} | ({"GPU": gpus} if gpus else {}) for _ in range(count)]
        selectors += [dict(labels) for _ in range(count)]
    return bundles, selectors


def _options(cpus: float, gpus: float, labels: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    return options | ({"label_selector": dict(labels)} if labels else {})


def _pool(
    kind: str, make: MakeWorker, size: int, config: RunConfig, options: Mapping[str, Any]
) -> Pool:
    wants = ", ".join(f"{key}={value}" for key, value in options.items() if value)
    pool = Pool(
        kind=kind,
        make=make,
        max_failures=config.cluster.max_restarts,
        window_s=config.cluster.restart_window_s,
        silence_s=config.rollout.lease_deadline_s,
        start_s=config.cluster.start_timeout_s,
        cluster=ClusterQueries(
            leaving_nodes=leaving_nodes,
            why_unplaced=lambda handle: why_unplaced(handle, wants),
        ),
    )
    pool.scale(size)
    pool.tend()
    return pool


# ------------------------------------------------------------------ what only Ray's inside knows


def leaving_nodes() -> dict[str, float]:
    """Return draining nodes (preempted, or taken away by the autoscaler) and when they leave.

    Times are of the monotonic clock. Ray tells them in unix time: only here the wall clock is read,
    for how long that is from now. Empty where this Ray has no such call: then the end of a node is
    a death like any other.
    """
    ask = getattr(state, "get_draining_nodes", None)
    if ask is None:
        return {}
    # No deadline is 0: the node stays until its work is done.
    now, unix = time.monotonic(), time.time()
    return {node: now + (ms / 1000 - unix if ms else _NO_HURRY_S) for node, ms in ask().items()}


def why_unplaced(handle: Handle, wants: str) -> str:
    """Return why an actor has not started: what no node has room for; empty when it has a place."""
    facts = ray_actors(handle._actor_id.hex())
    if facts.get("Pid"):
        return ""
    return f"no node has room for {wants}; add nodes, or mend the labels or the cores it asks for"
