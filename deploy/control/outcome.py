"""How far a run is, and what it leaves when it is over: facts, and the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.config.run import RunConfig
from common.metric_catalogue import Logged
from deploy.control.position import Position
from deploy.control.status import Status
from deploy.exchange.card import add_card
from deploy.health.watch import Watch
from deploy.run_folder.fingerprints import tensors_in
from deploy.run_folder.inputs import RunInputs
from deploy.workers.gang import LearnerGang
from deploy.workers.scaling import Elastic


def status_of(
    position: Position, elastic: Elastic, watch: Watch, metrics: Mapping[str, float]
) -> Status:
    """Return how far a run is; safe from any thread.

    Args:
        position: where it stands.
        elastic: its workers.
        watch: its health.
        metrics: of the last iteration.
    """
    ledger, collector = position.ledger, position.collector
    rollout, reward, weights = collector.rollout, collector.reward, collector.weights
    return Status(
        iteration=position.iteration,
        iterations=position.config.train.iterations,
        policy_version=weights.manifest.policy_version if weights else -1,
        metrics=dict(metrics),
        issued=ledger.issued,
        trained=ledger.trained,
        dropped=sum(dict(ledger.dropped).values()),
        in_flight=ledger.in_flight,
        rollout_workers=len(rollout.workers),
        reward_workers=len(reward.workers) if reward else 0,
        worker_failures=collector.tally.failures,
        learner_restarts=position.learner_restarts,
        counts=collector.counts(),
        workers=elastic.views(),
        health=list(watch.verdicts),
        under_way=collector.activity.under_way(),
    )


def facts_of(
    position: Position, metrics: Mapping[str, float], weights: str, untracked: Sequence[str]
) -> dict[str, Any]:
    """Return what is known of a run that is over.

    Args:
        position: where it stands.
        metrics: of the last iteration.
        weights: the hash of the exported policy; empty where the run was stopped.
        untracked: what services did not take.
    """
    ledger = position.ledger
    return {
        "finished": bool(weights),
        "iterations": position.iteration,
        "weights_hash": weights,
        "rollouts_issued": ledger.issued,
        "rollouts_trained": ledger.trained,
        "rollouts_dropped": sum(ledger.dropped.values()),
        "rollouts_in_flight": ledger.in_flight,
        "worker_failures": position.collector.tally.failures,
        "learner_restarts": position.learner_restarts,
        "leases_reissued": ledger.reissued,
        "train_kl": metrics.get(Logged.KL, 0.0),
        "out_of_patience": position.held_out.hopeless,
        "untracked": list(untracked),
    }


def export(config: RunConfig, gang: LearnerGang) -> str:
    """Write the policy of a finished run, and note it; returns the hash of what was trained."""
    policy = config.folder.policy.path
    weights_hash = gang.export_policy(policy)
    add_card(policy, config, "train")
    RunInputs(config.run_dir).end("train", tensors_in(policy))
    return weights_hash
