"""What can be asked of a run that exists: evaluate, sample, status, scale."""

from __future__ import annotations

import json
from typing import Any

import ray
from rich.console import Console

from common.config.run import RunConfig
from common.data.prompts import encode_prompts
from common.data.records import read_demonstrations
from common.errors import ClusterError, ConfigError
from common.files import write_atomic
from common.run_folder import RunFolder
from deploy.control.status import Status
from deploy.evaluation.compare import Judge, compare
from deploy.evaluation.results import PolicyComparison, figures_of
from deploy.evaluation.sampling import sample_both
from deploy.run_folder.log_lines import read_lines
from deploy.run_folder.weights import final_policy, is_there, policy_start
from deploy.stages.controller_actor import RemoteController
from deploy.stages.policy import start_pools
from deploy.stages.preparation import say_fitting
from deploy.stages.session import open_session
from deploy.workers.attach import cluster_at_work
from deploy.workers.preflight import explain
from deploy.workers.scaling import Scaled
from reward_service.scorers import FunctionScorer

_WORKERS_SHOWN = 32


def evaluate_run(config: RunConfig, console: Console) -> PolicyComparison:
    """Compare trained and supervised policy on the evaluation prompts; writes evaluation.json."""
    if not config.data.evaluation:
        raise ConfigError("data.evaluation is empty; evaluate needs held-out prompts")
    judge = _judge(config.evaluate.judge) if config.evaluate.judge else None
    held_out = read_demonstrations(config.data.evaluation, columns=config.data.columns)
    with open_session(config, console) as session:
        prompts, fitting = encode_prompts(
            [record.asked() for record in held_out],
            session.tokenizer(),
            max_tokens=config.max_prompt_tokens,
            too_long=config.data.too_long,
            limit=config.evaluate.prompts,
        )
        say_fitting(console, fitting)
        pools = start_pools(session, config)
        policies = policy_start(config), final_policy(config)
        before, after = sample_both(config, *policies, prompts, *pools, label="eval")
    comparison = compare([p.text for p in prompts], before, after, judge)
    figures = json.dumps(figures_of(comparison), indent=1).encode()
    write_atomic(config.folder.evaluation, [figures])
    return comparison


def status_of(config: RunConfig) -> dict[str, Any]:
    """Return the live status from the run's controller, else the last line of its log.

    Raises:
        ClusterError: the cluster that the run may be at work on does not answer.
        WorkerError: its controller does not.
    """
    with cluster_at_work(config) as there:
        controller = _controller(config) if there else None
        if controller is not None:
            return _live(controller.status())
    return {"running": False} | logged(config.folder)


def _live(status: Status) -> dict[str, Any]:
    """Return a status as `talipot status` prints it."""
    shown = {
        "running": True,
        "iteration": f"{status.iteration}/{status.iterations}",
        "issued": status.issued,
        "trained": status.trained,
        "dropped": status.dropped,
        "in_flight": status.in_flight,
        "rollout_workers": status.rollout_workers,
        "reward_workers": status.reward_workers,
        "worker_failures": status.worker_failures,
        "learner_restarts": status.learner_restarts,
        **status.metrics,
        **status.counts,
    }
    for worker in status.workers[:_WORKERS_SHOWN]:
        place = f" · node {worker.node[:8]} · process {worker.pid}" if worker.pid else ""
        shown[worker.name] = f"{worker.state}, {worker.calls} under way{place}"
    if len(status.workers) > _WORKERS_SHOWN:
        shown["more workers"] = len(status.workers) - _WORKERS_SHOWN
    return shown


def scale_run(config: RunConfig, actors: int | None, replicas: int | None) -> list[Scaled]:
    """Change a running run's numbers of workers; return old and new numbers at once.

    Raises:
        ConfigError: neither number is given.
        ClusterError: the run is not running, or its cluster does not grow and has no room.
    """
    if actors is None and replicas is None:
        raise ConfigError("give --actors, --reward-replicas or both")
    with cluster_at_work(config) as there:
        controller = _controller(config) if there else None
        if controller is None:
            raise ClusterError(
                f"{config.run_dir} is not running here; `talipot train --resume {config.run_dir}` "
                "carries on with it, and --address names its cluster"
            )
        if not config.cluster.autoscales:
            rollout: dict[str, Any] = {"actors": actors} if actors else {}
            reward: dict[str, Any] = {"replicas": replicas} if replicas else {}
            wanted = config.model_copy(
                update={
                    "rollout": config.rollout.model_copy(update=rollout),
                    "reward_service": config.reward_service.model_copy(update=reward),
                }
            )
            explain(wanted, ray.cluster_resources())
        return controller.scale(actors, replicas)


def _controller(config: RunConfig) -> RemoteController | None:
    """Find the run's controller, if it is at work on the cluster that was joined."""
    try:
        controller = RemoteController.named_by(config)
        ended = controller.outcome()
    except (ValueError, ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
        return None  # none there, one that dies, or one that keeps what ended its run
    return controller if ended is None else None


def logged(folder: RunFolder) -> dict[str, Any]:
    """Return how far a run came, by its log, whole or torn."""
    log = read_lines(folder.metrics)
    note = {"damaged": log.damaged[-1]} if log.damaged else {}
    if log.torn:
        note["torn"] = "the log's last line has no end; the run goes on, or was killed at it"
    if not log.lines:
        return {"logged": "nothing yet"} | note
    last = log.lines[-1]
    finished = is_there(folder.policy)
    return {"finished": finished, "stage": last.stage, "step": last.step, **last.metrics} | note


def _judge(target: str) -> Judge:
    return FunctionScorer(target, role="evaluate.judge", command=True).numbers
