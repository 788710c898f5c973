"""What can be done with a run that exists: evaluate it, and scale or ask it while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from rich.console import Console

from common.config.run import RunConfig
from common.errors import ClusterError, ConfigError
from common.files import write_atomic
from deploy.evaluation.compare import Judge, compare
from deploy.evaluation.results import PolicyComparison, figures_of
from deploy.evaluation.sampling import sample_both
from deploy.exchange.policies import policy_of
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.lock import Holder, at_work
from deploy.run_folder.progress import Told, is_final, recorded_facts
from deploy.run_folder.weights import policy_start
from deploy.screen import say
from deploy.stages.controller_actor import RemoteController
from deploy.stages.encoding import read_held_out
from deploy.stages.policy import start_pools
from deploy.stages.preparation import say_fitting
from deploy.stages.session import open_session
from deploy.standing import Standing, standing_of
from deploy.workers.attach import Answer, ask_cluster, way_to
from deploy.workers.preflight import explain
from deploy.workers.reservations import reserved
from deploy.workers.scaling import Scaled
from reward_service.scorers import FunctionScorer


def evaluate_run(
    config: RunConfig, console: Console, checkpoint: str | None = None
) -> PolicyComparison:
    """Compare a trained policy with the supervised one on the evaluation prompts.

    Writes ``evaluation.json``, and the same as that policy's own file.
    """
    if not config.data.evaluation:
        raise ConfigError("data.evaluation is empty; evaluate needs held-out prompts")
    judge = _judge(config.evaluate.judge) if config.evaluate.judge else None
    for stage in ("sft", "reward"):
        RunInputs(config.run_dir).require_result(stage)
    # Before anything starts: a word that names no policy is told at once.
    with (
        policy_of(config, checkpoint) as (chosen, weights),
        open_session(config, console) as session,
    ):
        if chosen.note:
            say(console, (chosen.note, "yellow"))
        prompts, fitting = read_held_out(session.tokenizer(), config)
        say_fitting(console, fitting)
        pools = start_pools(session, config)
        policies = policy_start(config), weights
        before, after = sample_both(config, *policies, prompts, *pools, label="eval")
    comparison = compare([p.text for p in prompts], before, after, judge)
    figures = figures_of(comparison) | {"iteration": chosen.iteration}
    for path in (config.folder.evaluation_of(chosen.iteration), config.folder.evaluation):
        write_atomic(path, [json.dumps(figures, indent=1).encode()])
    return comparison


def scale_run(
    config: RunConfig, actors: int | None, replicas: int | None, address: str | None = None
) -> list[Scaled]:
    """Change a running run's numbers of workers; return old and new numbers at once.

    Args:
        config: the run's.
        actors: rollout actors; None: as many as there are.
        replicas: reward workers, likewise.
        address: another way to the run's cluster than the one that its folder names.

    Raises:
        ConfigError: neither number is given.
        ClusterError: the run is not running, or its cluster does not grow and has no room.
    """
    if actors is None and replicas is None:
        raise ConfigError("give --actors, --reward-replicas or both")
    return _ask_controller(config, address, partial(_scale, config, actors, replicas))


def ask_standing(config: RunConfig, address: str | None = None) -> Standing:
    """Return how far a run is by its controller's own answer, beside what its folder says.

    Args:
        config: the run's.
        address: another way to the run's cluster than the one that its folder names.

    Raises:
        ClusterError: the run is not running, or its cluster does not answer.
        WorkerError: its controller does not answer.
    """
    status = _ask_controller(config, address, RemoteController.status)
    holder = at_work(config.run_dir)
    if holder is None:
        return standing_of(config)  # it has ended meanwhile
    now = Told(token=holder.token, time=time.time(), facts=asdict(status))
    return standing_of(config, last=now)


def _ask_controller(
    config: RunConfig, address: str | None, ask: Callable[[RemoteController], Answer]
) -> Answer:
    """Ask the controller of a run that is at work.

    Raises:
        ClusterError: there is none.
    """
    run, holder = config.run_dir, at_work(config.run_dir)
    if holder is None:
        facts = recorded_facts(run)
        done = is_final(facts, config)
        then = "it is finished" if done else f"`talipot train --resume {run}` carries on with it"
        raise ClusterError(f"{run} is not running; {then}")
    if holder.stage != "train" or not holder.cluster:
        raise ClusterError(f"{run}: {holder}, has no controller now; policy training has one")
    return ask_cluster(way_to(run, holder, address), partial(_asked, config, holder, ask))


def _asked(config: RunConfig, holder: Holder, ask: Callable[[RemoteController], Answer]) -> Answer:
    """Ask in the cluster that was joined."""
    try:
        controller = RemoteController.named_by(config)
        there = controller.recipe().run_dir.resolve() == config.run_dir.resolve()
    except (ValueError, ray.exceptions.RayActorError):
        there = False
    if not there:
        raise ClusterError(
            f"{config.run_dir} is not at work in this cluster: {holder}, works in the one at "
            f"{holder.cluster}; leave --address out, or ask again if it has just begun or ended"
        )
    return ask(controller)


def _scale(
    config: RunConfig, actors: int | None, replicas: int | None, controller: RemoteController
) -> list[Scaled]:
    """Scale, where there is room."""
    if not config.cluster.autoscales:
        each = reserved(config)  # by the workers that are there, and by new ones like them
        rollout: dict[str, Any] = {"actors": actors} if actors else {}
        reward: dict[str, Any] = {"replicas": replicas} if replicas else {}
        rollout["cpus_per_actor"], reward["cpus_per_replica"] = each.actor, each.replica
        learner = config.learner.model_copy(update={"cpus_per_rank": each.rank})
        wanted = config.model_copy(
            update={
                "learner": learner,
                "rollout": config.rollout.model_copy(update=rollout),
                "reward_service": config.reward_service.model_copy(update=reward),
            }
        )
        explain(wanted, ray.cluster_resources())
    return controller.scale(actors, replicas)


def _judge(target: str) -> Judge:
    return FunctionScorer(target, role="evaluate.judge", command=True).numbers
