"""From leases to scored trajectories, across workers that may come, go and die.

::

    ledger --lease--> rollout worker --table--> reward worker --table--> commit --> learner

`pump` is the one loop. It consumes: finished calls of either pool. Produces: commits in the ledger
and references to tables of ScoredTrajectory. Waits for: any outstanding call, at most a moment.
Unblocked by: a finished, failed or overdue call, or a worker that has started.

A lease stays leased until its rollouts are *scored*; whatever dies before, the lease is given back
and sampled again, and comes out the same (randomness is counter-based). A reward worker's death
loses nothing: the rollouts are still in the object store and go to its replacement. Rollouts whose
table was lost with a node, or which are too old to be trained, are sampled again too.

A worker does one call at a time, and a call's deadline begins when the worker begins it
(`deploy.control.deadlines`).
"""

from __future__ import annotations

import math
import time

import ray

from actors.rollout_actor import LeaseFacts, RolloutActor
from common.errors import TrainingError
from common.metric_catalogue import Logged
from common.wire.trajectory import RolloutRequest, to_table
from common.wire.weights import CorruptSliceError
from deploy.control.batches import Batches, Stale
from deploy.control.deadlines import Deadlines
from deploy.control.jobs import Sampled, Sampling, Scored, Scoring, Weights, first_share
from deploy.control.leases import Lease
from deploy.control.ledger import Ledger
from deploy.control.tally import Tally, Throughput
from deploy.run_folder.activity import Activity, Doing, Span
from deploy.workers.calls import ArgumentLost, WorkerLost, as_argument, start_pair
from deploy.workers.pool import Pool
from reward_service.service import RewardWorker, ScoreFacts

LEASES_PER_ACTOR = 2
"""One that it works on and one that waits, so that an actor never idles."""
CALL_TOKENS = 65_536
"""Tokens of prompts and responses of several leases that are scored in one call."""


class Collector:
    """Moves leases through both pools. Holds references and facts, never tensors."""

    def __init__(
        self,
        ledger: Ledger,
        rollout: Pool,
        reward: Pool | None,
        *,
        deadline_s: float,
        score_together: bool,
        score_last: bool = False,
        held_out: bool = False,
        call_tokens: int = CALL_TOKENS,
        leases_per_actor: int = LEASES_PER_ACTOR,
        activity: Activity | None = None,
    ) -> None:
        """Collect by these pools; without a reward pool (data collection) nothing is scored.

        Args:
            ledger: the books of what is to be sampled.
            rollout: rollout actors.
            reward: reward workers; without them rollouts are committed as they are sampled.
            deadline_s: what a worker has for a call.
            score_together: score waiting tables in common calls, an even share for each free
                worker.
            score_last: score when nothing is left to sample. Workers of both pools that share
                cores are in each other's way (measured on two cores: a third of the tokens a
                second), and whoever waits for all scores gains little from scoring the first early.
            held_out: score by what is `evaluation_only` too.
            call_tokens: most tokens that are scored together in a call.
            leases_per_actor: calls that an actor has at once.
            activity: is told what workers do, and when.
        """
        self.ledger = ledger
        self.rollout = rollout
        self.reward = reward
        self.weights: Weights | None = None
        self.lost_weights: Weights | None = None
        """Of which a slice was lost with its node: nobody can sample until others are here."""
        self.batches = Batches()
        self.throughput = Throughput()
        self.last_dead_letter = ""
        pools = self.pools
        self.tally = Tally(pools)
        self._deadlines = Deadlines(pools, deadline_s)
        self._corrupt_at = -1
        """Version of which a worker could not get an intact slice."""
        self._score_together, self._score_last = score_together, score_last
        self._score = RewardWorker.score_held_out if held_out else RewardWorker.score
        self._call_tokens, self._leases_per_actor = call_tokens, leases_per_actor
        self.activity = activity or Activity()
        self._sampling_is: Doing = "evaluating" if held_out else "sampling"
        self._known_until: dict[str, float] = {}
        """Until when it is recorded what a worker did; unix seconds."""
        self._sampling: dict[ray.ObjectRef[LeaseFacts], Sampling] = {}
        self._calls_of: dict[str, list[ray.ObjectRef[LeaseFacts]]] = {}
        """Calls of each rollout worker: it works on the first, the others wait behind it."""
        self._sampled: list[Sampled] = []
        self._scoring: dict[ray.ObjectRef[ScoreFacts], Scoring] = {}

    def tend(self) -> None:
        """Look after the workers alone, while there is no work for them yet.

        Raises:
            TalipotError: too many were lost, or none can start.
        """
        for pool in self.pools:
            pool.tend()

    def pump(self, timeout: float = 0.1) -> None:
        """Dispatch what can be dispatched, and take in what has finished.

        Raises:
            TalipotError: a worker cannot do its work, or too many were lost.
        """
        self.tend()
        self._dispatch()
        outstanding = [*self._sampling, *self._scoring]
        waited = [*outstanding, *(ref for pool in self.pools for ref in pool.probes())]
        if not waited:
            time.sleep(timeout)
            return
        ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        if not ready:
            ready, _ = ray.wait(waited, num_returns=1, timeout=timeout)
        for ref in ready:
            if ref in self._sampling:
                self._take_sampled(ref, self._sampling.pop(ref))
            elif ref in self._scoring:
                self._take_scored(ref, self._scoring.pop(ref))
        self._deadlines.end_hung_workers(self.ledger)
        self._hand_back()
        self._dispatch()

    def take(
        self, iteration: int, *, oldest: int, stale: Stale, least: int = 1
    ) -> list[Scored] | None:
        """Take a whole iteration to train on; see `deploy.control.batches.Batches.take`."""
        newest = self.weights.manifest.policy_version if self.weights else oldest
        return self.batches.take(
            self.ledger, iteration, oldest=oldest, newest=newest, stale=stale, least=least
        )

    def counts(self) -> dict[str, float]:
        """Return what happened since the run began, as metrics; from any thread."""
        return self.tally.metrics(self.ledger)

    def abandon(self) -> None:
        """Give up what is under way: its workers finish it, and are free for others from now on."""
        names = [job.worker for job in self._sampling.values()]
        names += [job.worker for job in self._scoring.values()]
        for name in names:
            self.activity.end(name, self._sampling_is)
            self.activity.end(name, "scoring")
        for pool in self.pools:
            for name in names:
                if worker := pool.workers.get(name):
                    worker.busy -= 1
        self._sampling, self._scoring, self._calls_of = {}, {}, {}

    # ------------------------------------------------------------------ the learner's restart

    def rewind(self, ledger: Ledger, version: int, max_staleness: int) -> None:
        """Go on with the books of an earlier policy version, every request in them queued again.

        Of what was in flight, rollouts sampled from that version or an older one are kept where
        staleness allows. All others belong to a history that is no longer true: their workers
        finish them, and the results are thrown away.
        """

        def fits(iteration: int, sampled_from: int) -> bool:
            return sampled_from <= version and iteration - sampled_from <= max_staleness

        def goes_on(lease: Lease, sampled_from: int) -> bool:
            return fits(lease.iteration, sampled_from) and any(map(ledger.holds, lease.rollout_ids))

        self.ledger = ledger
        self.batches.rewind(ledger, fits)
        self._sampled = [s for s in self._sampled if goes_on(s.lease, s.version)]
        for sampled in self._sampled:
            ledger.adopt(sampled.lease, "", math.inf)
        until = self._deadlines.from_now()
        for call, sampling in self._sampling.items():
            if self._deadlines.is_void(call):
                continue  # Of a history that was rolled back before this one.
            due = until if self._calls_of[sampling.worker][0] == call else math.inf
            if goes_on(sampling.lease, sampling.weights.manifest.policy_version):
                ledger.adopt(sampling.lease, sampling.worker, due)
            else:
                self._deadlines.void(call, sampling.worker, due)
        for scores, scoring in self._scoring.items():
            if self._deadlines.is_void(scores):
                continue
            if not all(goes_on(s.lease, s.version) for s in scoring.sampled):
                self._deadlines.void(scores, scoring.worker, until)
                continue
            for sampled in scoring.sampled:
                ledger.adopt(sampled.lease, scoring.worker, until)

    # ------------------------------------------------------------------ dispatch

    def _dispatch(self) -> None:
        until = self._deadlines.from_now()
        while (
            self.ledger.queued
            and self.weights
            and self.weights is not self.lost_weights
            and (worker := self.rollout.free(self._leases_per_actor))
        ):
            worker.busy += 1
            calls = self._calls_of.setdefault(worker.name, [])
            if not calls:
                self.activity.begin(worker.name, self._sampling_is)
            lease = self.ledger.lease(worker.name, math.inf if calls else until)
            requests = to_table(lease.requests, RolloutRequest)
            payloads = map(as_argument, self.weights.payloads)
            facts, rollouts = start_pair(
                worker.handle, RolloutActor.generate, requests, self.weights.manifest, *payloads
            )
            self._sampling[facts] = Sampling(
                worker.name, lease, self.weights, rollouts, time.time()
            )
            calls.append(facts)
        if self._score_last and (self.ledger.queued or self._sampling):
            return
        while self._sampled and self.reward and (scorers := self.reward.able(1)):
            scorer, part = scorers[0], self._next_to_score(len(scorers))
            self._sampled = [s for s in self._sampled if s not in part]
            scorer.busy += 1
            self.activity.begin(scorer.name, "scoring")
            for sampled in part:
                self.ledger.pass_on(sampled.lease.lease_id, scorer.name, until)
            tables = (as_argument(s.table) for s in part)
            scores, table = start_pair(scorer.handle, self._score, *tables)
            self._scoring[scores] = Scoring(scorer.name, part, table, time.time())

    def _next_to_score(self, workers: int) -> tuple[Sampled, ...]:
        """Choose the tables of one call while so many workers are free.

        All are of one version, so that a scored table is stale as a whole. A table that cost a
        worker goes alone: either it is the cause, or one that it was scored with.
        """
        first = self._sampled[0]
        if not self._score_together or self.ledger.failures(first.lease):
            return (first,)
        key = (first.lease.iteration, first.version)
        alike = [s for s in self._sampled if (s.lease.iteration, s.version) == key]
        together = [s for s in alike if not self.ledger.failures(s.lease)]
        return tuple(together[: first_share(together, workers, self._call_tokens)])

    def _end_call(self, worker: str, ended: ray.ObjectRef[LeaseFacts]) -> None:
        """Note that a rollout worker's call has ended: the deadline of the next one begins."""
        calls = self._calls_of[worker]
        first = calls[0] == ended
        calls.remove(ended)
        if not calls:
            del self._calls_of[worker]
            self.activity.end(worker, self._sampling_is)
        elif first and worker in self.rollout.workers:
            until = self._deadlines.from_now()
            self.activity.begin(worker, self._sampling_is)
            if self._deadlines.is_void(calls[0]):
                self._deadlines.void(calls[0], worker, until)
            else:
                self.ledger.pass_on(self._sampling[calls[0]].lease.lease_id, worker, until)

    def _hand_back(self) -> None:
        """Give all of a draining worker's leases to others but the one that it works on."""
        for worker in self.rollout.workers.values():
            if worker.state != "draining":
                continue
            for call in self._calls_of.get(worker.name, [])[1:]:
                self._calls_of[worker.name].remove(call)
                self._deadlines.forget(call)
                worker.busy -= 1
                self.ledger.give_back(self._sampling.pop(call).lease.lease_id, worker.name)

    # ------------------------------------------------------------------ taking in

    def _take_sampled(self, call: ray.ObjectRef[LeaseFacts], job: Sampling) -> None:
        facts: LeaseFacts | None = None
        try:
            facts = self.rollout.result(call, job.worker)
        except WorkerLost as lost:
            running = self._calls_of[job.worker][0]
            if lost.by_itself and not self._deadlines.is_void(running):
                guilty = job if running == call else self._sampling[running]
                self._deadlines.blame(self.ledger, [guilty.lease], job.worker, f"died: {lost}")
        except CorruptSliceError as error:
            self._corrupt(job, error)
        except ArgumentLost:
            self.lost_weights = job.weights
        self._end_call(job.worker, call)
        if self._deadlines.forget(call):
            return
        lease = job.lease
        if facts is None:
            self.ledger.give_back(lease.lease_id, job.worker)
            return
        expected = job.weights.manifest
        if facts.weights_fingerprint != expected.fingerprint:
            raise TrainingError(
                f"{facts.actor_id} sampled from weights {facts.weights_fingerprint[:12]}, not "
                f"from version {expected.policy_version} ({expected.fingerprint[:12]})"
            )
        self.tally.add({Logged.WEIGHTS_RELOADED: facts.reloads})
        self.throughput.sampled(facts)
        self._did(job, ("loading", facts.load_seconds), (self._sampling_is, facts.seconds))
        self.ledger.done(lease)
        tokens = facts.response_tokens + sum(len(r.prompt_ids) for r in lease.requests)
        sampled = Sampled(lease, facts.policy_version, tokens, job.table)
        if self.reward is None:
            self.batches.commit(self.ledger, job.table, facts.rollout_ids, (), (sampled,))
        else:
            self.ledger.pass_on(lease.lease_id, "", math.inf)  # It may wait long for a scorer.
            self._sampled.append(sampled)

    def _corrupt(self, job: Sampling, error: CorruptSliceError) -> None:
        """Replace a worker with a bad copy; when its successor has one too, the source is bad."""
        version = job.weights.manifest.policy_version
        if self._corrupt_at == version:
            raise error from None
        self._corrupt_at = version
        self.tally.add({Logged.WEIGHTS_RELOADED: 1})
        self.rollout.lost(job.worker, "corrupt", str(error))

    def _take_scored(self, call: ray.ObjectRef[ScoreFacts], job: Scoring) -> None:
        assert self.reward is not None
        self.activity.end(job.worker, "scoring")
        facts: ScoreFacts | None = None
        tables_lost = False
        try:
            facts = self.reward.result(call, job.worker)
        except WorkerLost as lost:
            if lost.by_itself and not self._deadlines.is_void(call):
                leases = [s.lease for s in job.sampled]
                self._deadlines.blame(self.ledger, leases, job.worker, f"died: {lost}")
        except ArgumentLost:
            tables_lost = True
        if facts is not None:
            self.tally.add(facts.http)
        if self._deadlines.forget(call):
            return
        if facts is None:
            self._score_again(job, tables_lost)
            return
        if facts.dead_letters:
            self.last_dead_letter = next(iter(facts.dead_letters.values()))
        self.throughput.scored(facts)
        self._did(job, ("scoring", facts.seconds))
        for sampled in job.sampled:
            self.ledger.done(sampled.lease)
        dead = tuple(facts.dead_letters)
        self.batches.commit(
            self.ledger, job.table, facts.rollout_ids, dead, job.sampled, facts.scores
        )

    def _score_again(self, job: Scoring, tables_lost: bool) -> None:
        """Score a failed call's tables once more; sample their leases again if they are lost."""
        for sampled in job.sampled:
            if tables_lost:
                self.ledger.give_back(sampled.lease.lease_id, job.worker)
            else:
                self.ledger.pass_on(sampled.lease.lease_id, "", math.inf)
        if not tables_lost:
            self._sampled = [*job.sampled, *self._sampled]

    def _did(self, job: Sampling | Scoring, *parts: tuple[Doing, float]) -> None:
        """Record what a call that has ended consisted of, in seconds.

        It began when it was handed out, or when the worker's call before it had ended; it may have
        been over for long before anybody looked.
        """
        begin = max(job.since, self._known_until.get(job.worker, 0.0))
        for what, seconds in parts:
            end = min(begin + seconds, time.time())
            if end > begin:
                self.activity.add(Span(worker=job.worker, what=what, begin=begin, end=end))
            begin = max(begin, end)
        self._known_until[job.worker] = begin

    @property
    def pools(self) -> list[Pool]:
        """Rollout actors, and reward workers where there are some."""
        return [self.rollout] if self.reward is None else [self.rollout, self.reward]
