"""Evaluation while training: held-out prompts, through the run's own workers and beside its books.

Its requests have a ledger of their own and are never among the run's rollouts. They are sampled
with the weights that are published already, from seeds that are the same each time, so training
goes on as if nothing had been asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.errors import RewardError
from common.metric_catalogue import Logged
from common.wire.trajectory import RolloutRequest, ScoredTrajectory, from_table
from deploy.control.collector import LEASES_PER_ACTOR, Collector
from deploy.control.jobs import Scored, Weights
from deploy.control.ledger import Ledger
from deploy.control.measures import evaluated
from deploy.control.tally import Tally
from deploy.run_folder.activity import Activity
from deploy.run_folder.log_lines import HELD_OUT, best_of, held_out_scores
from deploy.run_folder.progress import out_of_patience
from deploy.workers.pool import Pool

_GREEDY = f"{HELD_OUT}-greedy"
"""Label of the requests that are answered greedily."""


def collected(
    config: RunConfig,
    weights: Weights,
    requests: Sequence[RolloutRequest],
    rollout: Pool,
    reward: Pool | None,
    *,
    meanwhile: Callable[[], None] | None = None,
    renewed: Callable[[], Weights] | None = None,
    beside: bool = False,
    held_out: bool = False,
    tally: Tally | None = None,
    activity: Activity | None = None,
) -> list[Scored]:
    """Take requests through the pools, with a ledger of their own.

    Args:
        config: the recipe.
        weights: to sample from.
        requests: of no run's ledger.
        rollout: rollout actors.
        reward: reward workers; without them nothing is scored.
        meanwhile: called again and again while there is something to wait for.
        renewed: publishes the weights once more where a slice was lost with its node.
        beside: take idle workers alone, since another collector has work for the same ones.
        held_out: score by what is `evaluation_only` too.
        tally: the run's, to which what workers count meanwhile is added.
        activity: is told what workers do, and when.

    Raises:
        RewardError: no response was scored.
    """
    ledger = Ledger()
    ledger.issue(0, requests, config.rollout.lease_size)
    collector = Collector(
        ledger,
        rollout,
        reward,
        deadline_s=config.rollout.lease_deadline_s,
        score_together=False,
        score_last=True,
        held_out=held_out,
        leases_per_actor=1 if beside else LEASES_PER_ACTOR,
        activity=activity,
    )
    collector.weights = weights
    try:
        tables = _taken(collector, meanwhile, renewed)
    except BaseException:
        collector.abandon()
        raise
    finally:
        if tally is not None:
            tally.add(collector.tally.reported)
    if not tables:
        raise RewardError(
            f"evaluation: every one of {len(requests)} responses was given up by the reward "
            f"service; the last: {collector.last_dead_letter}"
        )
    return tables


def _taken(
    collector: Collector,
    meanwhile: Callable[[], None] | None,
    renewed: Callable[[], Weights] | None,
) -> list[Scored]:
    """Collect until all is there."""
    while (tables := collector.take(0, oldest=-1, stale="wait")) is None:
        if meanwhile is not None:
            meanwhile()
        if renewed is not None and collector.weights is collector.lost_weights:
            collector.weights = renewed()
        collector.pump()
    return tables


@dataclass(slots=True)
class HeldOut:
    """The held-out prompts of a run, and what their scores were so far."""

    config: RunConfig
    prompts: Sequence[EncodedPrompt]
    scores: dict[int, float]
    """`evaluate.metric` by policy version."""

    @classmethod
    def of(cls, config: RunConfig, prompts: Sequence[EncodedPrompt]) -> HeldOut:
        """Go on from what the run's folder says of evaluations before, of as many responses."""
        evaluate, path = config.evaluate, config.folder.metrics
        responses = len(prompts) * evaluate.samples
        return cls(config, prompts, held_out_scores(path, responses, evaluate.logged_metric))

    def rewind(self, version: int) -> None:
        """Forget the evaluations of later versions: their history is no longer true."""
        self.scores = {v: score for v, score in self.scores.items() if v <= version}

    def due(self, version: int) -> bool:
        """Tell whether a version is to be evaluated now: the first, each k-th and the last."""
        every, last = self.config.evaluate.every, self.config.train.iterations
        wanted = every and (version % every == 0 or version == last)
        return bool(wanted) and version not in self.scores

    @property
    def best(self) -> int | None:
        """The earliest version with the highest score; None before the first evaluation."""
        return best_of(self.scores)

    @property
    def hopeless(self) -> bool:
        """Whether `evaluate.patience` evaluations in a row were no better than one before them."""
        return out_of_patience(self.scores, self.config.evaluate.patience)

    def measure(
        self,
        version: int,
        own: Collector,
        publish: Callable[[int], None],
        meanwhile: Callable[[], None],
    ) -> dict[str, float]:
        """Evaluate the version that is published; returns its metrics.

        Args:
            version: of the policy.
            own: the run's collector, whose workers and weights are used.
            publish: publishes the version once more, where a slice of it was lost.
            meanwhile: called again and again while there is something to wait for.

        Raises:
            RewardError: no response was scored.
        """
        begin = time.perf_counter()
        settings = self.config.evaluate
        ask = partial(
            evaluation_requests,
            self.prompts,
            seed=self.config.seed,
            adapters=(self.config.train.adapter,),
        )
        requests = ask(label=HELD_OUT, samples=settings.samples)
        greedy = ask(label=_GREEDY, greedy=True) if settings.greedy else []

        def weights() -> Weights:
            assert own.weights is not None, "the first are published when a run begins"
            return own.weights

        def renewed() -> Weights:
            publish(version)
            return weights()

        pools = own.rollout, own.reward
        tables = collected(
            self.config,
            weights(),
            [*requests, *greedy],
            *pools,
            meanwhile=meanwhile,
            renewed=renewed,
            beside=self.config.train.max_staleness > 0,
            held_out=True,
            tally=own.tally,
            activity=own.activity,
        )
        rows = [row for s in tables for row in from_table(ray.get(s.table), ScoredTrajectory)]
        metrics = evaluated(sorted(rows, key=lambda row: row.rollout_id), self.config)
        metrics[Logged.RESPONSES] = float(len(requests))
        metrics[Logged.UNSCORED] = float(len(requests) + len(greedy) - len(rows))
        metrics[Logged.EVALUATE_SECONDS] = time.perf_counter() - begin
        if settings.logged_metric in metrics:
            self.scores[version] = metrics[settings.logged_metric]
        return metrics
