"""Scored rollouts on their way to the learner: committed table by table, taken by iteration."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import ray

from common.config.stages import TrainConfig
from common.errors import TrainingError
from common.metric_catalogue import Logged
from deploy.control.jobs import Sampled, Scored
from deploy.control.leases import lone
from deploy.control.ledger import Ledger
from deploy.workers.calls import lost_objects

Stale = Literal["drop", "wait"]


class Batches:
    """Tables of committed rollouts that wait to be trained."""

    def __init__(self) -> None:
        self.waiting: list[Scored] = []

    def commit(
        self,
        ledger: Ledger,
        table: ray.ObjectRef[pa.Table],
        rollout_ids: tuple[str, ...],
        dead: tuple[str, ...],
        sampled: tuple[Sampled, ...],
        scores: tuple[float, ...] = (),
    ) -> None:
        """Enter a table's rollouts and the dead letters beside it in the books; keep the table."""
        accepted = ledger.commit([*rollout_ids, *dead])
        if len(accepted) < len(rollout_ids) + len(dead):
            # Others came first. A table is used as a whole, so the rest of this one is not.
            ledger.resample(accepted, "late")
            return
        ledger.drop(dead, "dead letter")
        if rollout_ids:
            self.waiting.append(
                Scored(
                    table=table,
                    rollout_ids=rollout_ids,
                    iteration=sampled[0].lease.iteration,
                    policy_version=sampled[0].version,
                    leases=tuple(s.lease for s in sampled),
                    scores=scores,
                )
            )

    def take(
        self, ledger: Ledger, iteration: int, *, oldest: int, newest: int, stale: Stale, least: int
    ) -> list[Scored] | None:
        """Take all of an iteration in rollout_id order, once nothing of it is under way.

        Rollouts of versions before `oldest` are never among them (invariant I7): they are dropped,
        or sampled again when `stale` is "wait" or nothing else would be left. Those whose table was
        lost with its node are sampled again. Of prompts with fewer than `least` responses left they
        are dropped, and marked as left out.

        Args:
            ledger: the books.
            iteration: what is taken.
            oldest: version of the weights that may still be trained on.
            newest: version that actors sample from now.
            stale: what becomes of rollouts that are too old.
            least: responses of one prompt that an estimator needs.

        Returns:
            None while something is under way; nothing at all when nothing is left to train on.

        Raises:
            TrainingError: rollouts are too old, and actors would sample others as old as these.
        """
        if ledger.pending(iteration):
            return None
        mine = [s for s in self.waiting if s.iteration == iteration]
        tables = lost_objects([s.table for s in mine])
        lost = [s for s in mine if s.table in tables]
        old = [s for s in mine if s not in lost and s.policy_version < oldest]
        fresh = [s for s in mine if s not in lost and s not in old]
        if old and newest < oldest:
            raise TrainingError(
                f"iteration {iteration}: actors hold version {newest}, and {oldest} is the oldest "
                "that may be trained"
            )
        alone = lone([r for s in fresh for r in s.requests], least)
        usable = any(i not in alone for s in fresh for i in s.rollout_ids)
        # Of what was taken before, and waits for others beside it, some is settled already.
        ledger.resample(filter(ledger.holds, self._remove(lost)), "lost")
        settle = ledger.drop if stale == "drop" and usable else ledger.resample
        settle(filter(ledger.holds, self._remove(old)), "stale")
        if ledger.pending(iteration):
            return None
        ledger.drop(filter(ledger.holds, alone), "lone")
        self._remove(fresh)
        if not usable:
            return []
        fresh.sort(key=lambda s: s.rollout_ids[0])
        return [replace(s, left_out=alone.intersection(s.rollout_ids)) for s in fresh]

    def rewind(self, ledger: Ledger, fits: Callable[[int, int], bool]) -> None:
        """Commit to rewound books what fits them: (iteration, version sampled from) -> whether.

        What these books have not issued, prompts in place of others, is issued again and does not.
        """
        self.waiting = [
            s
            for s in self.waiting
            if fits(s.iteration, s.policy_version) and any(map(ledger.holds, s.rollout_ids))
        ]
        for scored in self.waiting:
            # What the books know to be dropped already is no late commit.
            ids = (i for lease in scored.leases for i in lease.rollout_ids if ledger.holds(i))
            ledger.drop(set(ledger.commit(ids)).difference(scored.rollout_ids), "dead letter")

    def _remove(self, some: Sequence[Scored]) -> list[str]:
        """Take tables out of those that wait; returns their rollouts."""
        self.waiting = [s for s in self.waiting if s not in some]
        return [rollout_id for scored in some for rollout_id in scored.rollout_ids]


def solves(score: float, threshold: float) -> bool:
    """Whether a score is as high as a threshold of the recipe.

    Scores are float32, and the 0.9 of a recipe is above the float32 that a reward of 0.9 becomes.
    """
    return score >= float(np.float32(threshold))


def without_signal(batch: Sequence[Scored]) -> frozenset[str]:
    """Return rollouts that are trained, and whose prompt's responses all have one score.

    Their advantages are 0 where responses of one prompt are compared (Yu 2025, section 3.2).
    """
    groups: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for scored in batch:
        score = dict(zip(scored.rollout_ids, scored.scores, strict=True))
        for request in scored.requests:
            if request.rollout_id not in scored.left_out:
                groups[request.group][request.rollout_id] = score[request.rollout_id]
    flat = [group for group in groups.values() if len({*group.values()}) == 1]
    return frozenset[str]().union(*flat)


def groups_of(batch: Sequence[Scored], without: frozenset[str] = frozenset()) -> int:
    """Return the number of prompts of which some response is trained."""
    trained = {i for scored in batch for i in scored.trained} - without
    return len({r.group for s in batch for r in s.requests if r.rollout_id in trained})


def staleness(batch: Sequence[Scored], iteration: int) -> dict[str, float]:
    """Return metrics of how many versions old what is trained is: the most, and a histogram."""
    ages: Counter[int] = Counter()
    for scored in batch:
        ages[iteration - scored.policy_version] += len(scored.trained)
    present = {age: float(count) for age, count in sorted(ages.items()) if count}
    return {Logged.STALENESS: float(max(present))} | {
        Logged.STALENESS_COUNT.of(age): count for age, count in present.items()
    }


def nothing_left(iteration: int, train: TrainConfig, last_dead_letter: str) -> str:
    """Return the message of an iteration that has too few scores to train on any rollout."""
    last = f"the last: {last_dead_letter}"
    if train.least_responses == 1:
        return f"every rollout of iteration {iteration} was given up by the reward service; {last}"
    return (
        f"iteration {iteration} has nothing to train on: {train.algorithm} compares responses of "
        f"one prompt, and so many were given up by the reward service that no prompt has "
        f"{train.least_responses} left; {last}"
    )
