"""Evaluation while training: held-out prompts, through the run's own workers and beside its books.

Its requests have a ledger of their own and are never among the run's rollouts. They are sampled
with the weights that are published already, from seeds that are the same each time, so training
goes on as if nothing had been asked.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import ray

from common.config.run import RunConfig
from common.config.stages import EvaluateConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.errors import RewardError
from common.metric_catalogue import Logged
from common.wire.trajectory import RolloutRequest, ScoredTrajectory, from_table
from deploy.control.batches import solves
from deploy.control.collector import LEASES_PER_ACTOR, Collector
from deploy.control.jobs import Scored, Weights
from deploy.control.ledger import Ledger
from deploy.control.tally import Tally, component_metric
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
        beside: another collector has work for the same workers: only those are taken that have
            nothing to do.
        held_out: score by what is `evaluation_only` too.
        tally: the run's, to which what workers count meanwhile is added.

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
    )
    collector.weights = weights
    try:
        while (tables := collector.take(0, oldest=-1, stale="wait")) is None:
            if meanwhile is not None:
                meanwhile()
            if renewed is not None and collector.weights is collector.lost_weights:
                collector.weights = renewed()
            collector.pump()
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
        )
        rows = [row for s in tables for row in from_table(ray.get(s.table), ScoredTrajectory)]
        rows.sort(key=lambda row: row.rollout_id)
        sampled = [row for row in rows if not row.greedy]
        metrics = measured(sampled, settings.solved) if sampled else {}
        metrics |= measured_greedily([row for row in rows if row.greedy], settings.solved)
        service = self.config.reward_service
        for name in service.components.keys() - service.scoring.keys():
            told_of = sum(name in row.score_components for row in sampled)
            metrics[Logged.UNJUDGED.of(name)] = float(len(sampled) - told_of)
        told = _by_prompt(rows, settings)
        if len(told) > 1:
            metrics[Logged.METRIC_ERROR] = stdev(told) / len(told) ** 0.5
        metrics[Logged.RESPONSES] = float(len(requests))
        metrics[Logged.UNSCORED] = float(len(requests) + len(greedy) - len(rows))
        metrics[Logged.EVALUATE_SECONDS] = time.perf_counter() - begin
        if settings.logged_metric in metrics:
            self.scores[version] = metrics[settings.logged_metric]
        return metrics


def measured(rows: Sequence[ScoredTrajectory], solved: float | None) -> dict[str, float]:
    """Return the metrics of scored responses, in rollout_id order.

    Args:
        rows: the responses; those to one prompt share their group.
        solved: score from which on a response has solved its prompt; None: no pass@k.
    """
    count = len(rows)
    metrics: dict[str, float] = {
        Logged.SCORE: sum(row.score for row in rows) / count,
        Logged.KL: sum(sum(row.policy_logprobs) - sum(row.ref_logprobs) for row in rows) / count,
        Logged.RESPONSE_LENGTH: sum(len(row.response_ids) for row in rows) / count,
        Logged.EOS_SHARE: sum(row.finish_reason != "length" for row in rows) / count,
    }
    of_source: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.source is not None:
            of_source[row.source.replace("/", ":")].append(row.score)
    for source, scores in sorted(of_source.items()):
        metrics[Logged.SOURCE_SCORE.of(source)] = sum(scores) / len(scores)
    said: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.score_components.items():
            said[component_metric(name)].append(value)
    metrics |= {name: sum(values) / len(values) for name, values in said.items()}
    if solved is None:
        return metrics
    groups: defaultdict[int, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(solves(row.score, solved))
    k, most = 1, max(map(len, groups.values()))
    while k <= most:  # of prompts with fewer scored responses it is not known
        rates = [pass_at_k(len(of), sum(of), k) for of in groups.values() if len(of) >= k]
        metrics[Logged.PASS_AT.of(k)] = sum(rates) / len(rates)
        k *= 2
    return metrics


def measured_greedily(rows: Sequence[ScoredTrajectory], solved: float | None) -> dict[str, float]:
    """Return the metrics of greedy responses, one to each prompt; none of none."""
    if not rows:
        return {}
    metrics: dict[str, float] = {Logged.GREEDY_SCORE: sum(row.score for row in rows) / len(rows)}
    if solved is not None:
        metrics[Logged.GREEDY_SOLVED] = sum(solves(row.score, solved) for row in rows) / len(rows)
    return metrics


def _by_prompt(rows: Sequence[ScoredTrajectory], settings: EvaluateConfig) -> list[float]:
    """Return `evaluate.metric` of each prompt: what it is known of as exactly as they are many."""
    kind, _, of = settings.logged_metric.partition("/")
    greedy = kind.startswith("greedy_")
    groups: defaultdict[int, list[ScoredTrajectory]] = defaultdict(list)
    for row in rows:
        other = kind == "score" and of and (row.source or "").replace("/", ":") != of
        if bool(row.greedy) == greedy and not other:
            groups[row.group].append(row)
    if kind == "component":
        said = ([r.score_components.get(of) for r in group] for group in groups.values())
        known = ([value for value in values if value is not None] for values in said)
        return [fmean(values) for values in known if values]
    if settings.solved is None or kind in ("score", "greedy_score"):
        return [fmean(row.score for row in group) for group in groups.values()]
    limit = settings.solved
    solved = [[solves(row.score, limit) for row in group] for group in groups.values()]
    k = int(kind.partition("@")[2] or 1)
    return [pass_at_k(len(group), sum(group), k) for group in solved if len(group) >= k]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples solves a prompt of which c of n do.

    ``1 - C(n - c, k) / C(n, k)`` (Chen 2021, equation 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
