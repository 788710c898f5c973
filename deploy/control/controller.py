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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.rollout_actor import LeaseFacts
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, PromptStream
from common.endings import at_the_end, take_all
from common.errors import RewardError, WorkerError
from common.metrics import read
from common.wire.weights import Manifest
from deploy.control.collector import Collector
from deploy.control.jobs import Scored, Weights
from deploy.control.ledger import Ledger
from deploy.control.status import Status, record
from deploy.run_folder import checkpoints
from deploy.run_folder.lock import writing
from deploy.run_folder.metrics_log import RunLog
from deploy.workers.gang import LearnerGang, LearnerLost
from deploy.workers.pool import Pool
from deploy.workers.scaling import Elastic, Scaled

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
    ) -> None:
        """`stop_after` ends the run after that many iterations, with a checkpoint.

        Workers that were not started when `run` begins are started by it, belong to this process
        and end with it.
        """
        self.config = config
        self.run_dir = config.run_dir
        self.gang = gang
        self.ledger = Ledger()
        self.stop_after = stop_after
        self.collector = Collector(
            self.ledger,
            rollout,
            reward,
            deadline_s=config.rollout.lease_deadline_s,
            merge=config.train.max_staleness > 0,
            observe=self._observe,
            call_tokens=_PASSES_PER_CALL * config.reward_service.micro_batch_tokens,
        )
        self.elastic = Elastic(config, rollout, reward)
        self._encoded = prompts
        self.prompts = self._stream(0)
        self.iteration = 0
        """Next iteration to train."""
        self._issued_until = 0
        """Iterations below this have been issued."""
        self._positions: dict[int, int] = {}
        """Prompt cursor before each issued, untrained iteration."""
        self.metrics: dict[str, float] = {}
        self._tokens = 0
        self._generate_s = 0.0
        self._load_s = 0.0
        self._own: list[Pool | LearnerGang] = []
        """Workers that this controller started."""
        self._batch: list[Scored] = []
        """What the learner is training on."""
        self._saved = -1
        """Iteration of the newest checkpoint written."""
        self.learner_restarts = 0
        self._restarts_left = config.learner.max_restarts
        self._stop = False

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end, as the run's only writer; returns the facts of the run.

        Raises:
            StorageError: another one is writing into the run's folder.
            TalipotError: the run could not do its work; nothing committed is lost.
        """
        # Its workers write too: a rank may be in the midst of a checkpoint.
        with writing(self.run_dir, "train"), at_the_end(self.end_workers):
            return self._run()

    def _run(self) -> dict[str, Any]:
        log = RunLog(self.run_dir)
        with at_the_end(self.elastic.release_room, log.close):
            self._start_workers()
            weights = self._train(log)
        self.ledger.check()
        facts = {
            "finished": bool(weights),
            "iterations": self.iteration,
            "weights_hash": weights,
            "rollouts_issued": self.ledger.issued,
            "rollouts_trained": self.ledger.trained,
            "rollouts_dropped": sum(self.ledger.dropped.values()),
            "rollouts_in_flight": self.ledger.in_flight,
            "worker_failures": self.collector.tally.failures,
            "learner_restarts": self.learner_restarts,
            "leases_reissued": self.ledger.reissued,
            "train_kl": self.metrics.get("kl", 0.0),
        }
        if weights:
            record(self.run_dir, facts)
        return facts

    def _train(self, log: RunLog) -> str:
        """All iterations, over deaths of the learner; the final weights' hash, "" when stopped."""
        ready = False
        while True:
            try:
                if not ready:
                    self._restore()
                    ready = True
                while self.iteration < self.config.train.iterations and not self._stop:
                    begin = time.perf_counter()
                    self._step()
                    self.metrics["seconds"] = time.perf_counter() - begin
                    self.elastic.adapt(self.metrics)
                    self.metrics["learner_restarts"] = float(self.learner_restarts)
                    log.write("train", self.iteration, self.metrics)
                    self._checkpoint_if_due()
                if self.iteration < self.config.train.iterations:
                    return ""
                exported: str = self.gang.call("export_policy", str(self.config.folder.policy.path))
                return exported
            except _Stopped:
                self._checkpoint()
                return ""
            except LearnerLost as error:
                ready = False
                self._restart_learner(error)

    def _restart_learner(self, error: LearnerLost) -> None:
        """Build another gang in place of one that is lost, a bounded number of times.

        Raises:
            WorkerError: it was lost once too often, with the rank and the cause.
        """
        while True:
            if not self._restarts_left:
                raise WorkerError(
                    f"{error}; the learner was restarted {self.learner_restarts} times in this "
                    "run, and learner.max_restarts allows no more; carry on with "
                    f"`talipot train --resume {self.run_dir}`"
                ) from None
            self._restarts_left -= 1
            self.learner_restarts += 1
            if error.data_lost:  # trained on again, it would be lost again
                self._batch = []
            try:
                self.gang.restart(self.collector.tend)
                return
            except LearnerLost as again:
                error = again

    def _step(self) -> None:
        """One iteration: collect, policy phase, auxiliary phase when due, publish."""
        iteration, train = self.iteration, self.config.train
        due = train.ppg is not None and (iteration + 1) % train.ppg.n_pi == 0
        ahead = train.max_staleness > 0
        self._issue(iteration + train.max_staleness)
        batch, waited = self._collect(iteration)
        self._batch = batch
        self.metrics = {"collect_seconds": waited} | self._statistics(batch)
        begin = time.perf_counter()
        self.metrics |= self._learn(
            "policy_phase",
            iteration,
            str(self.config.folder.trajectories(iteration)),
            *(s.table for s in batch),
            without=frozenset[str]().union(*(s.lone for s in batch)),
        )
        self.metrics["learn_seconds"] = time.perf_counter() - begin
        if ahead:  # Actors generate with the new weights while the auxiliary phase runs.
            self._publish(iteration + 1)
        if due:
            begin = time.perf_counter()
            self.metrics |= self._learn("auxiliary_phase", iteration)
            self.metrics["auxiliary_seconds"] = time.perf_counter() - begin
        if not ahead:
            self._publish(iteration + 1)
        self.ledger.train(i for s in batch for i in s.trained)
        self.ledger.check()
        self._batch = []
        self._positions.pop(iteration)
        self.iteration += 1

    def status(self) -> Status:
        """Progress; safe to call from another thread."""
        rollout, reward = self.collector.rollout, self.collector.reward
        return Status(
            iteration=self.iteration,
            iterations=self.config.train.iterations,
            policy_version=self.collector.weights.manifest.policy_version
            if self.collector.weights
            else -1,
            metrics=dict(self.metrics),
            issued=self.ledger.issued,
            trained=self.ledger.trained,
            dropped=sum(self.ledger.dropped.values()),
            in_flight=self.ledger.in_flight,
            rollout_workers=len(rollout.workers),
            reward_workers=len(reward.workers) if reward else 0,
            worker_failures=self.collector.tally.failures,
            learner_restarts=self.learner_restarts,
            counts=self.collector.counts(),
            workers=self.elastic.views(),
        )

    def scale(self, actors: int | None, replicas: int | None) -> list[Scaled]:
        """Other numbers of workers from now on (None: as it is); safe from another thread."""
        return self.elastic.scale(actors, replicas)

    def stop(self) -> None:
        """End with a checkpoint: after the phase in work, or at once while rollouts are awaited."""
        self._stop = True

    # ------------------------------------------------------------------ parts of a step

    def _stream(self, position: int) -> PromptStream:
        return PromptStream(
            self._encoded,
            seed=self.config.seed,
            position=position,
            adapter=self.config.train.adapter,
        )

    def _issue(self, until: int) -> None:
        """Issue all iterations up to and including `until`."""
        train = self.config.train
        while self._issued_until <= min(until, train.iterations - 1):
            iteration = self._issued_until
            self._positions[iteration] = self.prompts.position
            requests = self.prompts.requests(
                iteration, train.prompts_per_iteration, train.samples_per_prompt
            )
            size, least = self.config.rollout.lease_size, train.least_responses
            self.ledger.issue(iteration, requests, size, least=least)
            self._issued_until += 1

    def _collect(self, iteration: int) -> tuple[list[Scored], float]:
        """Every rollout of an iteration, in rollout_id order, and the seconds waited.

        Raises:
            RewardError: too few have a score to train on any.
        """
        begin = time.perf_counter()
        train = self.config.train
        oldest, least = iteration - train.max_staleness, train.least_responses

        def take() -> list[Scored] | None:
            return self.collector.take(iteration, oldest=oldest, stale=train.stale, least=least)

        while (mine := take()) is None:
            if self._stop:
                raise _Stopped
            if self.collector.weights is self.collector.lost_weights:
                self._publish(iteration)  # or the gang tells that a rank is lost with its node
            self.collector.pump()
        if not mine:
            raise RewardError(self._nothing_left(iteration))
        return mine, time.perf_counter() - begin

    def _nothing_left(self, iteration: int) -> str:
        train = self.config.train
        last = f"the last: {self.collector.last_dead_letter}"
        if train.least_responses == 1:
            return (
                f"every rollout of iteration {iteration} was given up by the reward service; {last}"
            )
        return (
            f"iteration {iteration} has nothing to train on: {train.algorithm} compares responses "
            f"of one prompt, and so many were given up by the reward service that no prompt has "
            f"{train.least_responses} left; {last}"
        )

    def _learn(self, method: str, *args: Any, **named: Any) -> dict[str, Any]:
        """Run a phase on the gang; in asynchronous mode rollouts keep moving meanwhile."""
        refs = self.gang.submit(method, *args, **named)
        found: dict[str, Any] = self.gang.finish(refs, method, lambda: self.collector.pump(0.0))
        return found

    def _publish(self, version: int) -> None:
        """Make a new version of the weights what actors must sample from."""
        begin = time.perf_counter()
        facts, payloads = self.gang.publish()
        manifest = Manifest(
            policy_version=version,
            total=facts[0].total,
            layout=facts[0].layout,
            slices=tuple(f.piece for f in facts),
        )
        self.collector.weights = Weights(manifest=manifest, payloads=tuple(payloads))
        self.metrics["publish_seconds"] = time.perf_counter() - begin
        self.metrics["policy_version"] = version

    def _statistics(self, batch: Sequence[Scored]) -> dict[str, float]:
        """Rates and means of the rollouts that arrived since the last iteration."""
        staleness: Counter[int] = Counter()
        for scored in batch:
            staleness[self.iteration - scored.policy_version] += len(scored.trained)
        found = {
            "tokens_per_second": self._tokens / max(self._generate_s, 1e-9),
            "generate_seconds": self._generate_s,
            "load_seconds": self._load_s,
            "score_seconds": self.collector.score_seconds,
            "staleness": float(max(age for age, n in staleness.items() if n)),
        }
        found |= {f"staleness/{age}": float(n) for age, n in sorted(staleness.items()) if n}
        found |= self.collector.counts()
        found |= {f"component/{k}": v for k, v in read(self.collector.components).items()}
        self._tokens, self._generate_s, self._load_s = 0, 0.0, 0.0
        self.collector.score_seconds, self.collector.components = 0.0, {}
        return found

    def _observe(self, facts: LeaseFacts) -> None:
        self._tokens += facts.response_tokens
        self._generate_s += facts.seconds
        self._load_s += facts.load_seconds

    # ------------------------------------------------------------------ checkpoints

    def _checkpoint_if_due(self) -> None:
        every, last = self.config.train.checkpoint_every, self.config.train.iterations
        if self.stop_after is not None and self.iteration >= self.stop_after:
            self._stop = True
        if (every and self.iteration % every == 0) or self._stop or self.iteration == last:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Write what the run is after `iteration` iterations, unless that is written already."""
        if self._saved != self.iteration:
            keep = self.config.train.keep_checkpoints
            checkpoints.write(self.run_dir, self.iteration, self._fill, keep=keep)
            self._saved = self.iteration

    def _fill(self, folder: Path) -> dict[str, Any]:
        learner = self._learn("save", str(folder.absolute()))
        return {
            "iteration": self.iteration,
            "config": self.config.model_dump(mode="json"),
            "prompt_position": self._positions.get(self.iteration, self.prompts.position),
            "ledger": self.ledger.state(),
            "learner": learner,
            "learner_restarts": self.learner_restarts,
            "counts": self.collector.tally.counted(),
        }

    def _restore(self) -> None:
        """Stand where the newest whole checkpoint stands, or at the start; publish its weights.

        What was issued beyond is issued again, less what is in flight and still of use.
        """
        found = checkpoints.newest(self.run_dir)
        self.gang.begin_train(self.config, self.collector.tend)
        state: dict[str, Any] = {}
        if found is not None:
            folder, state = found
            refs = self.gang.submit("load", str(folder.absolute()), state["learner"])
            self.gang.finish(refs, "load", self.collector.tend)
        issued = self._issued_until
        self.iteration = self._issued_until = self._saved = state.get("iteration", 0)
        checkpoints.rewind(self.run_dir, self.iteration)
        self.learner_restarts = max(self.learner_restarts, state.get("learner_restarts", 0))
        self.collector.tally.carry_on(state.get("counts", {}))
        self.prompts = self._stream(state.get("prompt_position", 0))
        self._positions = {}
        self.ledger = self.ledger.rewound(state.get("ledger"))
        ahead = self.iteration + self.config.train.max_staleness
        self._issue(min(issued - 1, ahead))
        self.collector.scored += self._batch
        self._batch = []
        self.collector.rewind(self.ledger, self.iteration, self.config.train.max_staleness)
        self.ledger.check()
        self._publish(self.iteration)

    def _start_workers(self) -> None:
        """Start what was not started yet, all at once: those workers are this process's own."""
        sizes = self.config.rollout.actors_at_start, self.config.reward_service.replicas
        pools = self.collector.rollout, self.collector.reward
        for pool, size in zip(pools, sizes, strict=True):
            if pool is not None and not pool.workers:
                self._own.append(pool)
                pool.scale(size)
        self.elastic.request_room()
        if not self.gang.started:
            self._own.append(self.gang)
            self.gang.start(self.collector.tend)

    def end_workers(self) -> None:
        """End the workers that this controller started, all of them; then raise what failed."""
        own, self._own = self._own, []
        take_all(*(each.stop for each in reversed(own)))
