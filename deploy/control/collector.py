"""From leases to scored trajectories, across workers that may come, go and die.

::

    ledger --lease--> rollout worker --table--> reward worker --table--> commit --> learner

`pump` is the one loop. It consumes: finished calls of either pool. Produces: commits in the ledger
and references to tables of ScoredTrajectory. Waits for: any outstanding call, at most a moment.
Unblocked by: a finished, failed or overdue call, or a worker that has started.

A lease stays leased until its rollouts are *scored*; whatever dies before, the lease is given back
and sampled again, and comes out the same (randomness is counter-based). A reward worker's death
loses nothing: the rollouts are still in the object store and go to its replacement. Rollouts whose
table went down with a node, or which are too old to be trained, are sampled again too.

A worker does one call at a time, and a deadline begins with the call that is in work. A lease that
costs a worker three times in a row, by its deadline or by the worker's death, would cost every
worker: it ends the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import ray

from actors.rollout_actor import LeaseFacts
from common.errors import TrainingError, WorkerError
from common.metrics import Metrics, mean, merge
from common.wire.trajectory import RolloutRequest, to_table
from common.wire.weights import CorruptSliceError
from deploy.control.groups import lone
from deploy.control.jobs import Sampled, Sampling, Scored, Scoring, Weights, first_share
from deploy.control.ledger import Lease, Ledger
from deploy.control.tally import Tally
from deploy.workers.calls import ArgumentLost, WorkerLost, gone, result
from deploy.workers.pool import Pool
from reward_service.service import ScoreFacts

_LEASES_PER_ACTOR = 2
"""One in work and one waiting, so that an actor never idles."""
_TRIES = 3
"""Workers that a lease may cost in a row; with the last one the run ends."""
CALL_TOKENS = 65_536
"""Tokens of prompts and responses of several leases that are scored in one call."""

Stale = Literal["drop", "wait"]


class Collector:
    """Moves leases through both pools. Holds references and facts, never tensors."""

    def __init__(
        self,
        ledger: Ledger,
        rollout: Pool,
        reward: Pool | None,
        *,
        deadline_s: float,
        merge: bool,
        observe: Callable[[LeaseFacts], None],
        call_tokens: int = CALL_TOKENS,
    ) -> None:
        """`merge` scores waiting tables together, up to `call_tokens` in a call, shared out evenly
        among the workers that are free; without a reward pool rollouts are committed as they are
        sampled (evaluation, data collection)."""
        self.ledger = ledger
        self.rollout = rollout
        self.reward = reward
        self.weights: Weights | None = None
        self.lost_weights: Weights | None = None
        """Of which a slice went down with its node: nobody can sample until others are here."""
        self.scored: list[Scored] = []
        self.components: Metrics = {}
        """Mean of each component over what was scored since it was last emptied."""
        self.score_seconds = 0.0
        """Time that reward workers spent since it was last set to 0."""
        self.last_dead_letter = ""
        self.tally = Tally(self._pools())
        self._corrupt_at = -1
        """Version of which a worker could not get an intact slice."""
        self._deadline_s = deadline_s
        self._merge = merge
        self._call_tokens = call_tokens
        self._observe = observe
        self._sampling: dict[ray.ObjectRef[Any], Sampling] = {}
        self._turns: dict[str, list[ray.ObjectRef[Any]]] = {}
        """By rollout worker, its calls: the first is in work, what follows waits behind it."""
        self._sampled: list[Sampled] = []
        self._scoring: dict[ray.ObjectRef[Any], Scoring] = {}
        self._void: dict[ray.ObjectRef[Any], float] = {}
        """Calls of a history that was rolled back, and their deadlines: what they bring is thrown
        away."""

    def tend(self) -> None:
        """Look after the workers alone, while there is no work for them yet.

        Raises:
            TalipotError: too many were lost, or none can start.
        """
        for pool in self._pools():
            pool.tend()

    def pump(self, timeout: float = 0.1) -> None:
        """Dispatch what can be dispatched, and take in what has finished.

        Raises:
            TalipotError: a worker cannot do its work, or too many were lost.
        """
        self.tend()
        self._dispatch()
        outstanding = [*self._sampling, *self._scoring]
        waited = [*outstanding, *(ref for pool in self._pools() for ref in pool.probes())]
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
        self._overdue()
        self._hand_back()
        self._dispatch()

    def take(
        self, iteration: int, *, oldest: int, stale: Stale, least: int = 1
    ) -> list[Scored] | None:
        """All of an iteration in rollout_id order, once nothing of it is under way; None before.

        Rollouts of versions before `oldest` are never among them (invariant I7): they are dropped,
        or sampled again when `stale` is "wait" or nothing else would be left. Those whose table
        went down with its node are sampled again. Of prompts with fewer than `least` responses left
        they are dropped, and marked as `lone`; the list is empty when nothing is left to train on.
        """
        if self.ledger.pending(iteration):
            return None
        mine = [s for s in self.scored if s.iteration == iteration]
        tables = gone([s.table for s in mine])
        lost = [s for s in mine if s.table in tables]
        old = [s for s in mine if s not in lost and s.policy_version < oldest]
        fresh = [s for s in mine if s not in lost and s not in old]
        if old and self.weights and self.weights.manifest.policy_version < oldest:
            raise TrainingError(
                f"iteration {iteration}: actors hold version "
                f"{self.weights.manifest.policy_version}, and {oldest} is the oldest that may be "
                "trained"
            )
        alone = lone([r for s in fresh for r in s.requests], least)
        usable = any(i not in alone for s in fresh for i in s.rollout_ids)
        self._forget(lost, "lost")
        self._forget(old, "stale", drop=stale == "drop" and usable)
        if self.ledger.pending(iteration):
            return None
        self.ledger.drop(alone, "lone")
        self.scored = [s for s in self.scored if s not in fresh]
        if not usable:
            return []
        fresh.sort(key=lambda s: s.rollout_ids[0])
        return [replace(s, lone=alone.intersection(s.rollout_ids)) for s in fresh]

    def counts(self) -> dict[str, float]:
        """What happened since the run began, as metrics; from any thread."""
        return self.tally.metrics(self.ledger)

    # ------------------------------------------------------------------ the learner's restart

    def rewind(self, ledger: Ledger, version: int, max_staleness: int) -> None:
        """Go on with the books of an earlier policy version, every request in them queued again.

        Of what was in flight, rollouts sampled from that version or an older one are kept where
        staleness allows; all others are of a history that is no more. Their workers go on, and what
        they bring is thrown away.
        """

        def fits(iteration: int, sampled_from: int) -> bool:
            return sampled_from <= version and iteration - sampled_from <= max_staleness

        self.ledger = ledger
        self.scored = [s for s in self.scored if fits(s.iteration, s.policy_version)]
        self._sampled = [s for s in self._sampled if fits(s.lease.iteration, s.version)]
        for scored in self.scored:
            # What the books know to be dropped already is no late commit.
            ids = (i for lease in scored.leases for i in lease.rollout_ids if ledger.holds(i))
            ledger.drop(set(ledger.commit(ids)).difference(scored.rollout_ids), "dead letter")
        for sampled in self._sampled:
            ledger.adopt(sampled.lease, "", math.inf)
        until = time.monotonic() + self._deadline_s
        for ref, sampling in self._sampling.items():
            if ref in self._void:
                continue  # Of a history that was rolled back before this one.
            due = until if self._turns[sampling.worker][0] == ref else math.inf
            if fits(sampling.lease.iteration, sampling.weights.manifest.policy_version):
                ledger.adopt(sampling.lease, sampling.worker, due)
            else:
                self._void[ref] = due
        for ref, scoring in self._scoring.items():
            if ref in self._void:
                continue
            if not fits(scoring.sampled[0].lease.iteration, scoring.sampled[0].version):
                self._void[ref] = until
                continue
            for sampled in scoring.sampled:
                ledger.adopt(sampled.lease, scoring.worker, until)

    def _is_void(self, ref: ray.ObjectRef[Any]) -> bool:
        return self._void.pop(ref, None) is not None

    # ------------------------------------------------------------------ dispatch

    def _dispatch(self) -> None:
        now = time.monotonic()
        while (
            self.ledger.queued
            and self.weights
            and self.weights is not self.lost_weights
            and (worker := self.rollout.free(_LEASES_PER_ACTOR))
        ):
            worker.busy += 1
            turns = self._turns.setdefault(worker.name, [])
            lease = self.ledger.lease(worker.name, math.inf if turns else now + self._deadline_s)
            table = to_table(lease.requests, RolloutRequest)
            facts, rollouts = worker.handle.generate.options(num_returns=2).remote(
                table, self.weights.manifest, *self.weights.payloads
            )
            self._sampling[facts] = Sampling(worker.name, lease, self.weights, rollouts)
            turns.append(facts)
        while self._sampled and self.reward and (scorers := self.reward.able(1)):
            scorer, part = scorers[0], self._next_to_score(len(scorers))
            self._sampled = [s for s in self._sampled if s not in part]
            scorer.busy += 1
            for sampled in part:
                lease_id = sampled.lease.lease_id
                self.ledger.pass_on(lease_id, scorer.name, now + self._deadline_s)
            facts, table = scorer.handle.score.options(num_returns=2).remote(
                *(s.table for s in part)
            )
            self._scoring[facts] = Scoring(scorer.name, part, table)

    def _next_to_score(self, workers: int) -> tuple[Sampled, ...]:
        """Tables for one call while so many workers are free; of one version, so that a scored
        table is stale as a whole. One that cost a worker goes alone: the cause, or its company.
        """
        first = self._sampled[0]
        if not self._merge or self.ledger.failures(first.lease):
            return (first,)
        key = (first.lease.iteration, first.version)
        alike = [s for s in self._sampled if (s.lease.iteration, s.version) == key]
        together = [s for s in alike if not self.ledger.failures(s.lease)]
        return tuple(together[: first_share(together, workers, self._call_tokens)])

    def _next_turn(self, worker: str, ended: ray.ObjectRef[Any]) -> None:
        """A call has ended: the time of what waited behind it begins."""
        turns = self._turns[worker]
        first = turns[0] == ended
        turns.remove(ended)
        if not turns:
            del self._turns[worker]
        elif first and worker in self.rollout.workers:
            until = time.monotonic() + self._deadline_s
            if turns[0] in self._void:
                self._void[turns[0]] = until
            else:
                self.ledger.pass_on(self._sampling[turns[0]].lease.lease_id, worker, until)

    # ------------------------------------------------------------------ taking in

    def _take_sampled(self, ref: ray.ObjectRef[Any], job: Sampling) -> None:
        facts: LeaseFacts | None = None
        try:
            facts = result(ref, self.rollout, job.worker)
        except WorkerLost as lost:
            in_work = self._turns[job.worker][0]
            if lost.by_itself and in_work not in self._void:
                guilty = job if in_work == ref else self._sampling[in_work]
                self._blame([guilty.lease], job.worker, f"died: {lost}")
        except CorruptSliceError as error:
            self._corrupt(job, error)
        except ArgumentLost:
            self.lost_weights = job.weights
        self._next_turn(job.worker, ref)
        if self._is_void(ref):
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
        self.tally.add({"weights_reloaded": facts.reloads})
        self._observe(facts)
        self.ledger.done(lease)
        tokens = facts.response_tokens + sum(len(r.prompt_ids) for r in lease.requests)
        sampled = Sampled(lease, facts.policy_version, tokens, job.table)
        if self.reward is None:
            self._commit(job.table, facts.rollout_ids, (), (sampled,))
        else:
            self.ledger.pass_on(lease.lease_id, "", math.inf)  # A scorer may be long in coming.
            self._sampled.append(sampled)

    def _corrupt(self, job: Sampling, error: CorruptSliceError) -> None:
        """One worker may have a bad copy; when its successor has one too, the source is bad."""
        version = job.weights.manifest.policy_version
        if self._corrupt_at == version:
            raise error from None
        self._corrupt_at = version
        self.tally.add({"weights_reloaded": 1})
        self.rollout.lost(job.worker, "corrupt", str(error))

    def _take_scored(self, ref: ray.ObjectRef[Any], job: Scoring) -> None:
        assert self.reward is not None
        facts: ScoreFacts | None = None
        lost = False
        try:
            facts = result(ref, self.reward, job.worker)
        except WorkerLost as words:
            if words.by_itself and ref not in self._void:
                self._blame([s.lease for s in job.sampled], job.worker, f"died: {words}")
        except ArgumentLost:
            lost = True
        if facts is not None:
            self.tally.add({f"http/{name}": count for name, count in facts.http.items()})
        if self._is_void(ref):
            return
        if facts is None:
            for sampled in job.sampled:
                if lost:
                    self.ledger.give_back(sampled.lease.lease_id, job.worker)
                else:
                    self.ledger.pass_on(sampled.lease.lease_id, "", math.inf)
            self._sampled = self._sampled if lost else [*job.sampled, *self._sampled]
            return
        if facts.dead_letters:
            self.last_dead_letter = next(iter(facts.dead_letters.values()))
        rows = len(facts.rollout_ids)
        means = {name: mean(value * rows, rows) for name, value in facts.component_means.items()}
        self.components = merge([self.components, means])
        self.score_seconds += facts.seconds
        for sampled in job.sampled:
            self.ledger.done(sampled.lease)
        self._commit(job.table, facts.rollout_ids, tuple(facts.dead_letters), job.sampled)

    def _commit(
        self,
        table: ray.ObjectRef[Any],
        rollout_ids: tuple[str, ...],
        dead: tuple[str, ...],
        sampled: tuple[Sampled, ...],
    ) -> None:
        """Enter a table's rollouts in the books, and keep it to be trained."""
        accepted = self.ledger.commit([*rollout_ids, *dead])
        if len(accepted) < len(rollout_ids) + len(dead):
            # Others came first. A table is used as a whole, so the rest of this one is not.
            self.ledger.resample(accepted, "late")
            return
        self.ledger.drop(dead, "dead letter")
        if rollout_ids:
            self.scored.append(
                Scored(
                    table=table,
                    rollout_ids=rollout_ids,
                    iteration=sampled[0].lease.iteration,
                    policy_version=sampled[0].version,
                    leases=tuple(s.lease for s in sampled),
                )
            )

    # ------------------------------------------------------------------ what takes too long

    def _overdue(self) -> None:
        """Find hung workers by their deadlines; their calls then fail like a death."""
        now = time.monotonic()
        late: dict[str, list[Lease]] = {}
        for lease, holder in self.ledger.overdue(now):
            late.setdefault(holder, []).append(lease)
        jobs: dict[ray.ObjectRef[Any], Sampling | Scoring] = {**self._sampling, **self._scoring}
        for ref, until in self._void.items():
            if until < now:
                late.setdefault(jobs[ref].worker, [])
        why = f"no answer within {self._deadline_s:g} s (rollout.lease_deadline_s)"
        for holder, leases in late.items():
            if any(pool.lost(holder, "hung", why) for pool in self._pools()):
                self._blame(leases, holder, f"hung: {why}")

    def _blame(self, leases: Sequence[Lease], worker: str, how: str) -> None:
        """A worker was lost at work on these.

        Raises:
            WorkerError: one of them costs every worker that gets it; named, with what to change.
        """
        for lease in leases:
            if self.ledger.failed(lease) >= _TRIES:
                ids = lease.rollout_ids
                hint = "".join(p.hint for p in self._pools() if worker.startswith(f"{p.kind}-"))
                raise WorkerError(
                    f"lease {lease.lease_id} (rollouts {ids[0]} to {ids[-1]}) cost {_TRIES} "
                    f"workers in a row, and would cost others; the last was {worker}, {how}. Raise "
                    "rollout.lease_deadline_s if it takes longer than that; lower rollout.cache_mb "
                    f"or reward_service.micro_batch_tokens if memory ran out{hint}"
                )

    def _hand_back(self) -> None:
        """Of a draining worker's leases all but the one in work go to others."""
        for worker in self.rollout.workers.values():
            if worker.state != "draining":
                continue
            for ref in self._turns.get(worker.name, [])[1:]:
                self._turns[worker.name].remove(ref)
                self._void.pop(ref, None)
                worker.busy -= 1
                self.ledger.give_back(self._sampling.pop(ref).lease.lease_id, worker.name)

    def _forget(self, some: Sequence[Scored], reason: str, *, drop: bool = False) -> None:
        """Take tables out of what is to be trained, to be sampled again or dropped."""
        ids = [rollout_id for scored in some for rollout_id in scored.rollout_ids]
        if ids:
            (self.ledger.drop if drop else self.ledger.resample)(ids, reason)
            self.scored = [s for s in self.scored if s not in some]

    def _pools(self) -> list[Pool]:
        return [self.rollout] if self.reward is None else [self.rollout, self.reward]
