"""The controller: the only place that knows the whole loop.

::

    prompts -> ledger -> collector (rollout pool, reward pool) -> gang.policy_phase
                  ^                                                      |
                  '------------- weights (manifest) <--- gang.publish <--'

Consumes: references to scored tables, metrics. Produces: leases, manifests, checkpoints, logs.
Waits for: the collector (every rollout of an iteration accounted for) and the gang (a phase), each
with a deadline. Unblocked by: finished calls. Moves references and facts, never tensors.

Synchronous mode (`max_staleness = 0`): an iteration is issued once its weights are published, and
ends in the same weights for any number of workers. Asynchronous mode issues `max_staleness`
iterations ahead, and rollouts are sampled while the learner trains.

A learner rank that dies takes the run back to its newest whole checkpoint (or its start): another
gang is built, everything the checkpoint holds is restored, and what is in flight is kept where the
restored weights allow it. The surviving history trains every rollout once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.endings import at_the_end
from common.errors import RewardError, WorkerError
from common.metric_catalogue import Logged
from deploy import trackers
from deploy.control.batches import groups_of, nothing_left, staleness
from deploy.control.collector import Collector
from deploy.control.held_out import HeldOut
from deploy.control.issuing import Issuer
from deploy.control.jobs import Scored
from deploy.control.ledger import Ledger
from deploy.control.outcome import export, facts_of, status_of
from deploy.control.own_workers import OwnWorkers
from deploy.control.position import Position
from deploy.control.readings import readings_of
from deploy.control.status import Status
from deploy.gauges import Reading
from deploy.health.watch import Watch
from deploy.run_folder.activity import Activity
from deploy.run_folder.failures import note_health, note_lost, note_restart, note_untracked
from deploy.run_folder.lock import writing
from deploy.run_folder.log_lines import HELD_OUT
from deploy.run_folder.metrics_log import RunLog
from deploy.run_folder.progress import record, telling
from deploy.workers.attach import own_address
from deploy.workers.gang import LearnerGang, LearnerLost
from deploy.workers.pool import Pool
from deploy.workers.scaling import Elastic, Scaled
from learner.algorithms.schedule import auxiliary_phase_due

_PASSES_PER_CALL = 8
"""Frozen passes of `reward_service.micro_batch_tokens` that several leases may fill in one scoring
call: enough that a call costs little beside them, and few enough for the deadline of a lease."""


class _Stopped(Exception):
    """The run was asked to stop: the iteration that is being collected is abandoned."""


class Controller:
    """Runs policy training from first iteration (or a checkpoint) to the exported policy."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[EncodedPrompt],
        gang: LearnerGang,
        rollout: Pool,
        reward: Pool,
        stop_after: int | None = None,
        held_out: Sequence[EncodedPrompt] = (),
    ) -> None:
        """Control a run with these workers.

        Workers that were not started when `run` begins are started by it, belong to this process
        and end with it. `stop_after` ends the run after that many iterations, with a checkpoint;
        `held_out` are the prompts of `evaluate.every`.
        """
        self.config = config
        self.run_dir = config.run_dir
        self.gang = gang
        self.stop_after = stop_after
        ledger = Ledger()
        self.collector = Collector(
            ledger,
            rollout,
            reward,
            deadline_s=config.rollout.lease_deadline_s,
            score_together=config.train.max_staleness > 0,
            call_tokens=_PASSES_PER_CALL * config.reward_service.micro_batch_tokens,
        )
        self.elastic = Elastic(config, rollout, reward)
        self.own_workers = OwnWorkers(config, gang, self.collector, self.elastic)
        self.issuer = Issuer(config, prompts)
        self.held_out = HeldOut.of(config, held_out)
        self.position = Position(config, gang, ledger, self.collector, self.issuer, self.held_out)
        self.metrics: dict[str, float] = {}
        """Of the last iteration."""
        self.watch = Watch(config)
        self._restarts_left = config.learner.max_restarts
        self._stop = False
        self._progress = time.time()
        """When the last iteration ended, or this began."""

    @property
    def iteration(self) -> int:
        """Next iteration to train."""
        return self.position.iteration

    @property
    def ledger(self) -> Ledger:
        """The run's books."""
        return self.position.ledger

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end, as the run's only writer; returns the facts of the run.

        Raises:
            StorageError: another one is writing into the run's folder.
            TalipotError: the run could not do its work; nothing committed is lost.
        """
        with writing(self.run_dir, "train", own_address()) as holder:
            # Its workers write too: a rank may be writing a checkpoint when the run ends.
            told = telling(self.config.folder.status, holder.token, lambda: asdict(self.status()))
            with told, at_the_end(self.own_workers.end):
                return self._run()

    def _run(self) -> dict[str, Any]:
        trackers.begin(self.config)
        untracked: list[str] = []

        def tell(text: str) -> None:
            untracked.append(text)
            note_untracked(self.config.folder.events, text)

        log = RunLog(self.run_dir, trackers.outboxes(self.config, tell), self._readings)
        self.collector.activity = log.activity
        with at_the_end(self.position.end, self.elastic.release_room, log.close):
            self.own_workers.start()
            weights = self._train(log)
        self.ledger.check()
        facts = facts_of(self.position, self.metrics, weights, untracked)
        if weights:
            record(self.run_dir, facts)
        return facts

    def _train(self, log: RunLog) -> str:
        """Train all iterations, over deaths of the learner.

        Returns:
            The hash of the final weights, "" when the run was stopped.
        """
        last, restored, stopped = self.config.train.iterations, False, False
        while True:
            try:
                if not restored:
                    with log.activity.doing("starting"):
                        self.position.restore()
                    restored = True
                    if not stopped:
                        self._evaluate_if_due(log)
                if stopped:
                    self.position.checkpoint()
                while self.iteration < last and not (self._stop or self.held_out.hopeless):
                    metrics: dict[str, float] = {}
                    with _timed(metrics, Logged.SECONDS):
                        self._iterate(metrics, log.activity)
                    self.elastic.adapt(metrics)
                    metrics[Logged.LEARNER_RESTARTS] = float(self.position.learner_restarts)
                    self.metrics = metrics
                    self._write(log, "train", metrics)
                    self._evaluate_if_due(log)
                    with log.activity.doing("saving"):
                        self._checkpoint_if_due()
                    self._progress = time.time()
                self.position.finish_checkpoint()
                if stopped or (self.iteration < last and not self.held_out.hopeless):
                    return ""
                return export(self.config, self.gang)
            except _Stopped:
                stopped = True
            except LearnerLost as error:
                restored = False
                with log.activity.doing("starting"):
                    self._restart_learner(error)

    def _iterate(self, metrics: dict[str, float], activity: Activity) -> None:
        """Train one iteration: the whole algorithm, step by step."""
        iteration, train = self.iteration, self.config.train
        asynchronous = train.max_staleness > 0
        self.issuer.issue(self.ledger, until=iteration + train.max_staleness)
        with _timed(metrics, Logged.COLLECT_SECONDS):
            batch = self._collect(iteration)
        metrics |= self._collected(batch)
        with _timed(metrics, Logged.LEARN_SECONDS), activity.doing("learning"):
            # The KL penalty and its controller's update, advantages, the epochs of PPO: all in
            # `learner.learner.Learner.policy_phase`.
            metrics |= self._policy_phase(iteration, batch)
        if asynchronous:  # Actors generate with the new weights while the auxiliary phase runs.
            with _timed(metrics, Logged.PUBLISH_SECONDS), activity.doing("publishing"):
                self.position.publish(iteration + 1)
        if auxiliary_phase_due(train.ppg, iteration):
            move = self.position.move_rollouts
            with _timed(metrics, Logged.AUXILIARY_SECONDS), activity.doing("auxiliary"):
                metrics |= self.gang.auxiliary_phase(iteration, meanwhile=move)
        if not asynchronous:
            with _timed(metrics, Logged.PUBLISH_SECONDS), activity.doing("publishing"):
                self.position.publish(iteration + 1)
        metrics[Logged.POLICY_VERSION] = iteration + 1
        # Not before: an iteration in which a learner rank dies is begun again.
        metrics |= self.collector.throughput.read()
        self.position.account(batch)

    def status(self) -> Status:
        """Return how far the run is; safe to call from another thread."""
        return status_of(self.position, self.elastic, self.watch, self.metrics)

    def _readings(self) -> list[Reading]:
        """Return what is true now, for Ray's metrics; from any thread."""
        return readings_of(
            self.collector,
            self.watch,
            restarts=self.position.learner_restarts,
            progress=self._progress,
        )

    def scale(self, actors: int | None, replicas: int | None) -> list[Scaled]:
        """Wish for other numbers of workers (None: as it is); safe from another thread."""
        return self.elastic.scale(actors, replicas)

    def stop(self) -> None:
        """End with a checkpoint: after the current iteration, or at once while collecting."""
        self._stop = True

    # ------------------------------------------------------------------ parts of a step

    def _collect(self, iteration: int) -> list[Scored]:
        """Wait for every rollout of an iteration; returns them in rollout_id order.

        Raises:
            RewardError: too few have a score to train on any.
        """
        train = self.config.train
        oldest, least = iteration - train.max_staleness, train.least_responses

        def take() -> list[Scored] | None:
            before = self.ledger.resampled["lost"]
            part = self.collector.take(iteration, oldest=oldest, stale=train.stale, least=least)
            if lost := self.ledger.resampled["lost"] - before:
                note_lost(
                    self.config.folder.events,
                    f"{lost} of iteration {iteration}, with a node; they are sampled again",
                )
            return part

        batch: list[Scored] | None = None
        while batch is None:
            while (part := take()) is None:
                if self._stop:
                    raise _Stopped
                if self.collector.weights is self.collector.lost_weights:
                    self.position.publish(
                        iteration
                    )  # or the gang tells that a rank is lost with its node
                self.position.settle_checkpoint()
                self.collector.pump()
            if (batch := self.issuer.telling(self.ledger, iteration, part)) is None:
                self.collector.batches.waiting += part  # until others have come beside it
        if not batch:
            raise RewardError(nothing_left(iteration, train, self.collector.last_dead_letter))
        return batch

    def _collected(self, batch: Sequence[Scored]) -> dict[str, float]:
        """Return metrics of a batch, and the run's counts."""
        return staleness(batch, self.iteration) | self._prompts(batch) | self.collector.counts()

    def _prompts(self, batch: Sequence[Scored]) -> dict[str, float]:
        found = {Logged.PROMPTS_TRAINED: float(groups_of(batch))}
        if self.config.data.curriculum is not None:
            found[Logged.PROMPTS_LEFT_OUT] = float(len(self.issuer.left_out(self.iteration)))
        return {str(name): value for name, value in found.items()}

    def _policy_phase(self, iteration: int, batch: Sequence[Scored]) -> dict[str, float]:
        """Run the policy phase on a batch, less what has nothing to be compared with."""
        self.position.batch = list(batch)
        return self.gang.policy_phase(
            iteration,
            self.config.folder.trajectories(iteration),
            [s.table for s in batch],
            without=frozenset[str]().union(*(s.left_out for s in batch)),
            meanwhile=self.position.move_rollouts,
        )

    def _evaluate_if_due(self, log: RunLog) -> None:
        """Ask the held-out prompts of a version that the recipe wants to know of."""
        if not self.held_out.due(self.iteration):
            return

        def meanwhile() -> None:
            if self._stop:
                raise _Stopped
            self.position.move_rollouts()

        measured = self.held_out.measure(
            self.iteration, self.collector, self.position.publish, meanwhile
        )
        self._write(log, HELD_OUT, measured)

    def _write(self, log: RunLog, stage: str, metrics: Mapping[str, float]) -> None:
        """Log a step, and what it says of the run's health."""
        log.write(stage, self.iteration, metrics)
        for verdict in self.watch.look(stage, self.iteration, metrics):
            note_health(self.config.folder.events, f"{verdict.check}: {verdict.evidence}")

    # ------------------------------------------------------------------ the learner's restart

    def _restart_learner(self, error: LearnerLost) -> None:
        """Build another gang in place of one that is lost, a bounded number of times.

        Raises:
            WorkerError: it was lost once too often, with the rank and the cause.
        """
        while True:
            if not self._restarts_left:
                raise WorkerError(
                    f"{error}; the learner was restarted {self.position.learner_restarts} times in "
                    "this run, and learner.max_restarts allows no more; carry on with "
                    f"`talipot train --resume {self.run_dir}`"
                ) from None
            self._restarts_left -= 1
            self.position.learner_restarts += 1
            note_restart(
                self.config.folder.events, f"{error}; {self._restarts_left} more may follow"
            )
            if error.data_lost:  # trained on again, it would be lost again
                self.position.batch = []
            try:
                self.gang.restart(self.collector.tend)
                return
            except LearnerLost as again:
                error = again

    # ------------------------------------------------------------------ checkpoints

    def _checkpoint_if_due(self) -> None:
        every, last = self.config.train.checkpoint_every, self.config.train.iterations
        if self.stop_after is not None and self.iteration >= self.stop_after:
            self._stop = True
        if (
            (every and self.iteration % every == 0)
            or self._stop
            or self.iteration == last
            or self.held_out.best == self.iteration
            or self.held_out.hopeless
        ):
            self.position.checkpoint()


@contextmanager
def _timed(metrics: dict[str, float], name: Logged) -> Iterator[None]:
    """Note how many seconds the block took."""
    begin = time.perf_counter()
    yield
    metrics[name] = time.perf_counter() - begin
