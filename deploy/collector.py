"""From leases to scored trajectories, across workers that may die.

::

    ledger --lease--> rollout worker --table--> reward worker --table--> commit --> learner

`pump` is the one loop. It consumes: finished calls of either pool. Produces: commits in the ledger
and references to tables of ScoredTrajectory. Waits for: any outstanding call, at most a moment.
Unblocked by: a finished, failed or overdue call.

A lease stays leased until its rollouts are *scored*; whatever dies before, the lease is given back
and sampled again, and comes out the same (randomness is counter-based). A reward worker's death
loses nothing: the rollouts are still in the object store and go to its replacement.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from actors.rollout_actor import LeaseFacts
from common.errors import TalipotError, TrainingError
from common.trajectory import RolloutRequest, to_table
from common.weights import Manifest
from deploy.gang import plain
from deploy.ledger import Lease, Ledger, LedgerError
from deploy.pool import Pool
from reward_service.service import ScoreFacts

_LEASES_PER_ACTOR = 2
"""One in work and one waiting, so that an actor never idles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What actors must sample from: the manifest and the references to its slices."""

    manifest: Manifest
    payloads: tuple[ray.ObjectRef[Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Committed trajectories of one scoring call; the table stays in the object store."""

    table: ray.ObjectRef[Any]
    rollout_ids: tuple[str, ...]
    iteration: int
    """Iteration that the rollouts were issued for."""
    policy_version: int
    """Oldest version in the table."""
    newest: int
    """Newest version in the table."""
    leases: tuple[Lease, ...]
    """What the rollouts were leased as; dead letters among them are not in the table."""


@dataclass(frozen=True, slots=True)
class _Sampling:
    worker: str
    lease: Lease
    weights: Weights
    table: ray.ObjectRef[Any]
    deadline: float


@dataclass(frozen=True, slots=True)
class _Sampled:
    lease: Lease
    facts: LeaseFacts
    table: ray.ObjectRef[Any]


@dataclass(frozen=True, slots=True)
class _Scoring:
    worker: str
    sampled: tuple[_Sampled, ...]
    table: ray.ObjectRef[Any]
    deadline: float


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
    ) -> None:
        """`merge` hands all waiting tables to a reward worker in one call; without a reward pool
        rollouts are committed as they are sampled (evaluation, data collection)."""
        self.ledger = ledger
        self.rollout = rollout
        self.reward = reward
        self.weights: Weights | None = None
        self.scored: list[Scored] = []
        self.component_means: dict[str, float] = {}
        self.score_seconds = 0.0
        """Time that reward workers spent since it was last set to 0."""
        self.dead_letters: Counter[int] = Counter()
        """Rollouts given up by the reward service, by iteration."""
        self.last_dead_letter = ""
        self._deadline_s = deadline_s
        self._merge = merge
        self._observe = observe
        self._sampling: dict[ray.ObjectRef[Any], _Sampling] = {}
        self._sampled: list[_Sampled] = []
        self._scoring: dict[ray.ObjectRef[Any], _Scoring] = {}
        self._void: set[ray.ObjectRef[Any]] = set()
        """Calls of a history that was rolled back: what they bring is thrown away."""

    def pump(self, timeout: float = 0.1) -> None:
        """Dispatch what can be dispatched, and take in what has finished."""
        self._dispatch()
        outstanding = [*self._sampling, *self._scoring]
        if not outstanding:
            time.sleep(timeout)
            return
        ready, _ = ray.wait(outstanding, num_returns=len(outstanding), timeout=0)
        if not ready:
            ready, _ = ray.wait(outstanding, num_returns=1, timeout=timeout)
        for ref in ready:
            if ref in self._sampling:
                self._take_sampled(ref, self._sampling.pop(ref))
            elif ref in self._scoring:
                self._take_scored(ref, self._scoring.pop(ref))
        self._overdue()
        self._dispatch()

    # ------------------------------------------------------------------ dispatch

    def _dispatch(self) -> None:
        now = time.monotonic()
        while (
            self.ledger.queued and self.weights and (worker := self.rollout.free(_LEASES_PER_ACTOR))
        ):
            lease = self.ledger.lease()
            table = to_table(lease.requests, RolloutRequest)
            worker.busy += 1
            facts, rollouts = worker.handle.generate.options(num_returns=2).remote(
                table, self.weights.manifest, *self.weights.payloads
            )
            self._sampling[facts] = _Sampling(
                worker.name,
                lease,
                self.weights,
                rollouts,
                now + self._deadline_s * worker.busy,
            )
        while self._sampled and self.reward and (scorer := self.reward.free(1)):
            first = self._sampled[0].lease.iteration
            part = tuple(
                s for s in self._sampled if self._merge and s.lease.iteration == first
            ) or (self._sampled[0],)
            self._sampled = [s for s in self._sampled if s not in part]
            scorer.busy += 1
            facts, table = scorer.handle.score.options(num_returns=2).remote(
                *(s.table for s in part)
            )
            self._scoring[facts] = _Scoring(scorer.name, part, table, now + self._deadline_s)

    # ------------------------------------------------------------------ the learner's restart

    def rewind(self, ledger: Ledger, version: int, max_staleness: int) -> None:
        """Go on with the books of an earlier policy version, every request in them queued again.

        Of what was in flight, rollouts sampled from that version or an older one are kept where
        staleness allows; all others are of a history that is no more. Their workers go on, and what
        they bring is thrown away.
        """

        def fits(iteration: int, *sampled_from: int) -> bool:
            return max(sampled_from) <= version and iteration - min(sampled_from) <= max_staleness

        def fit(*sampled: _Sampled) -> bool:
            return fits(sampled[0].lease.iteration, *(s.facts.policy_version for s in sampled))

        self.scored = [s for s in self.scored if fits(s.iteration, s.policy_version, s.newest)]
        self._sampled = [s for s in self._sampled if fit(s)]
        self._void |= {
            ref
            for ref, job in self._sampling.items()
            if not fits(job.lease.iteration, job.weights.manifest.policy_version)
        }
        self._void |= {ref for ref, job in self._scoring.items() if not fit(*job.sampled)}
        kept = [lease for s in self.scored for lease in s.leases]
        kept += [s.lease for s in self._sampled]
        kept += [job.lease for ref, job in self._sampling.items() if ref not in self._void]
        for ref, job in self._scoring.items():
            kept += [s.lease for s in job.sampled if ref not in self._void]
        self.ledger = ledger
        ledger.adopt(kept)
        self.dead_letters.clear()
        for s in self.scored:
            self._commit_again(s)

    def _commit_again(self, scored: Scored) -> None:
        """In new books: what a lease has more than the table was a dead letter."""
        for lease in scored.leases:
            ids = [request.rollout_id for request in lease.requests]
            self.ledger.commit(lease.lease_id, ids)
            dead = set(ids).difference(scored.rollout_ids)
            self.ledger.drop(dead, "dead letter")
            self.dead_letters[lease.iteration] += len(dead)

    def _is_void(self, ref: ray.ObjectRef[Any]) -> bool:
        void = ref in self._void
        self._void.discard(ref)
        return void

    # ------------------------------------------------------------------ taking in

    def _take_sampled(self, ref: ray.ObjectRef[Any], job: _Sampling) -> None:
        facts: LeaseFacts | None = self._result(ref, self.rollout, job.worker)
        if self._is_void(ref):
            return
        if facts is None:
            self.ledger.give_back(job.lease.lease_id)
            return
        expected = job.weights.manifest
        if facts.weights_fingerprint != expected.fingerprint:
            raise TrainingError(
                f"{facts.actor_id} sampled from weights {facts.weights_fingerprint[:12]}, not "
                f"from version {expected.policy_version} ({expected.fingerprint[:12]})"
            )
        self._observe(facts)
        if self.reward is not None:
            self._sampled.append(_Sampled(job.lease, facts, job.table))
        elif self.ledger.commit(job.lease.lease_id, facts.rollout_ids):
            self.scored.append(
                Scored(
                    table=job.table,
                    rollout_ids=facts.rollout_ids,
                    iteration=job.lease.iteration,
                    policy_version=facts.policy_version,
                    newest=facts.policy_version,
                    leases=(job.lease,),
                )
            )

    def _take_scored(self, ref: ray.ObjectRef[Any], job: _Scoring) -> None:
        assert self.reward is not None
        facts: ScoreFacts | None = self._result(ref, self.reward, job.worker)
        if self._is_void(ref):
            return
        if facts is None:
            self._sampled = [*job.sampled, *self._sampled]
            return
        for sampled in job.sampled:
            if not self.ledger.commit(sampled.lease.lease_id, sampled.facts.rollout_ids):
                raise LedgerError(f"lease {sampled.lease.lease_id} was scored twice")
        iteration = job.sampled[0].lease.iteration
        if facts.dead_letters:
            self.dead_letters[iteration] += len(facts.dead_letters)
            self.last_dead_letter = next(iter(facts.dead_letters.values()))
            self.ledger.drop(facts.dead_letters, "dead letter")
        self.component_means = dict(facts.component_means)
        self.score_seconds += facts.seconds
        if not facts.rollout_ids:
            return
        self.scored.append(
            Scored(
                table=job.table,
                rollout_ids=facts.rollout_ids,
                iteration=iteration,
                policy_version=min(s.facts.policy_version for s in job.sampled),
                newest=max(s.facts.policy_version for s in job.sampled),
                leases=tuple(s.lease for s in job.sampled),
            )
        )

    def _result(self, ref: ray.ObjectRef[Any], pool: Pool, worker: str) -> Any:
        """A call's result, or None when its worker was lost and has been replaced."""
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            found = plain(error)
            if isinstance(found, TalipotError):
                raise found from None
            if not isinstance(getattr(error, "cause", None), ray.exceptions.RayError):
                raise
            # An argument of the call was lost with its node: the worker itself is well.
            pool.succeeded(worker)
            return None
        except ray.exceptions.RayError as error:
            pool.replace(worker, str(error).strip().splitlines()[0])
            return None
        pool.succeeded(worker)
        return result

    def _overdue(self) -> None:
        """Find hung workers by their deadlines; their calls then fail like a death."""
        now = time.monotonic()
        for pool, jobs in (
            (self.rollout, self._sampling),
            (self.reward, self._scoring),
        ):
            for job in jobs.values():
                if pool is not None and now > job.deadline:
                    pool.replace(job.worker, f"no answer within {self._deadline_s:.0f} s")
