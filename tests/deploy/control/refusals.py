"""A run whose responses are refused by seed, with everything real but the arithmetic.

Controller, ledger, collector, pools, checkpoints and the object store are those of any run. What a
rollout actor, a reward worker and the learner compute is left out: responses are of one length, a
score is refused as the request's seed says, and the learner writes down what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from actors.rollout_actor import LeaseFacts
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, PromptStream
from common.wire.trajectory import (
    Rollout,
    RolloutRequest,
    ScoredTrajectory,
    extend,
    from_table,
    rows_without,
    to_table,
)
from common.wire.weights import Manifest
from deploy.control.controller import Controller
from deploy.control.tally import Throughput
from deploy.workers.gang import LearnerLost
from deploy.workers.pool import Pool
from reward_service.service import ScoreFacts
from tests.deploy.control.simulated import TOKENS, SleepingActor


def refused(request: RolloutRequest) -> bool:
    """Whether a request's response will get no score, as its prompt says: ``SHARE FIRST`` is this
    share of all, from that iteration on."""
    share, first = request.prompt_text.split()
    return int(request.rollout_id[:6]) >= int(first) and request.seed < float(share) * 2**64


class RefusingScorer:
    """The interface of `reward_service.service.RewardWorker`."""

    def score(self, *tables: pa.Table) -> tuple[ScoreFacts, pa.Table]:
        rows = [row for table in tables for row in from_table(table, Rollout)]
        scored = [
            extend(
                row,
                ScoredTrajectory,
                score=1.0,
                score_components={},
                ref_logprobs=[-1.0] * TOKENS,
                reward_version=0,
            )
            for row in rows
            if not refused(row)
        ]
        facts = ScoreFacts(
            rollout_ids=tuple(row.rollout_id for row in scored),
            scores=tuple(row.score for row in scored),
            dead_letters={row.rollout_id: "refused" for row in rows if refused(row)},
            seconds=0.0,
        )
        return facts, to_table(scored, ScoredTrajectory)


class Notes:
    """The interface of `deploy.workers.gang.LearnerGang`: notes the rows of every iteration.

    `dies` says at which policy phases (counted over the run) a rank dies, and after how many turns
    of the loop that moves rollouts meanwhile.
    """

    def __init__(self, dies: dict[int, int] | None = None) -> None:
        self.started = True
        self.dies = dies or {}
        self.phases = 0
        self.trained: dict[int, list[tuple[str, int]]] = {}
        """(rollout id, policy version) of each iteration of the surviving history."""

    def begin_train(self, config: RunConfig, meanwhile: Callable[[], None]) -> None:
        self.trained = {}

    def policy_phase(
        self,
        iteration: int,
        log: Path | None,
        tables: Sequence[ray.ObjectRef[pa.Table]],
        *,
        without: Collection[str],
        meanwhile: Callable[[], None],
    ) -> dict[str, float]:
        turns = self.dies.get(self.phases, 0)
        for _ in range(turns or 2):
            meanwhile()
        self.phases += 1
        if turns:
            raise LearnerLost("learner-1 died in policy_phase")
        kept = [rows_without(ray.get(table), without) for table in tables]
        rows = from_table(pa.concat_tables(kept), ScoredTrajectory)
        self.trained[iteration] = sorted((row.rollout_id, row.policy_version) for row in rows)
        return {}

    def begin_save(self, folder: Path, *, meanwhile: Callable[[], None]) -> dict[str, Any]:
        return dict(self.trained)

    def saved(self, *, meanwhile: Callable[[], None]) -> dict[str, str]:
        return {}

    def load(self, folder: Path, state: dict[str, Any], *, meanwhile: Callable[[], None]) -> None:
        self.trained = {int(k): [(i, v) for i, v in rows] for k, rows in state.items()}

    def export_policy(self, folder: Path) -> str:
        return "weights"

    def publish(self, version: int) -> tuple[Manifest, tuple[()]]:
        return Manifest(policy_version=version, total=0, layout="", slices=()), ()

    def restart(self, meanwhile: Callable[[], None]) -> None:
        """Another gang knows nothing."""
        self.trained = {}

    def rows(self) -> dict[int, list[str]]:
        """Rollout ids that were trained, by iteration."""
        return {i: [rollout_id for rollout_id, _ in rows] for i, rows in self.trained.items()}


class Watched(Controller):
    """A controller that remembers how leases were composed, and may be stopped after so many."""

    def __init__(self, *args: Any, stop_at_lease: int = -1, **named: Any) -> None:
        super().__init__(*args, **named)
        self.leases: list[tuple[str, ...]] = []
        self.stop_at_lease = stop_at_lease
        self.collector.throughput = Watching(self)


class Watching(Throughput):
    """Tells a controller of every lease that was sampled."""

    def __init__(self, controller: Watched) -> None:
        super().__init__()
        self.controller = controller

    def sampled(self, facts: LeaseFacts) -> None:
        super().sampled(facts)
        self.controller.leases.append(facts.rollout_ids)
        if len(self.controller.leases) == self.controller.stop_at_lease:
            self.controller.stop()


class Workshop:
    """Worker processes that serve one run after the other."""

    def __init__(self) -> None:
        actor, scorer = ray.remote(SleepingActor), ray.remote(RefusingScorer)
        self.rollout = [actor.options(num_cpus=0).remote(f"r{i}", 0.0, "text") for i in range(2)]
        self.reward = [scorer.options(num_cpus=0).remote() for _ in range(2)]

    def pools(self) -> tuple[Pool, Pool]:
        made = []
        for kind, handles in (("rollout", self.rollout), ("reward", self.reward)):
            left = list(handles)
            pool = Pool(kind=kind, make=lambda _, left=left: left.pop(), max_failures=0)
            pool.scale(len(handles))
            pool.tend()
            made.append(pool)
        return made[0], made[1]

    def controller(
        self, config: RunConfig, gang: Notes, share: float, first: int = 0, **options: Any
    ) -> Watched:
        return Watched(config, prompts(share, first), gang, *self.pools(), **options)


def prompts(share: float, first: int = 0) -> list[EncodedPrompt]:
    """Some, of whose responses this share is refused, from this iteration on."""
    return [EncodedPrompt(uid=f"p{i}", text=f"{share} {first}", ids=[1]) for i in range(5)]


def requests(config: RunConfig, share: float) -> list[list[RolloutRequest]]:
    """Those of each iteration."""
    train, stream = config.train, PromptStream(prompts(share), seed=config.seed)
    return [
        stream.requests(iteration, train.prompts_per_iteration, train.samples_per_prompt)
        for iteration in range(train.iterations)
    ]


def expected(config: RunConfig, share: float) -> dict[int, list[str]]:
    """What each iteration has to train on, read off the requests alone."""
    found = {}
    for iteration, made in enumerate(requests(config, share)):
        alive = [r for r in made if not refused(r)]
        groups = [r.group for r in alive]
        least = 2 if config.train.algorithm in ("grpo", "rloo") else 1
        found[iteration] = [r.rollout_id for r in alive if groups.count(r.group) >= least]
    return found


def reasons(config: RunConfig, share: float) -> dict[str, int]:
    """How many rollouts have to be dropped for which reason."""
    made = [r for of_one in requests(config, share) for r in of_one]
    dead = sum(map(refused, made))
    alone = len(made) - dead - sum(map(len, expected(config, share).values()))
    return {reason: n for reason, n in (("dead letter", dead), ("lone", alone)) if n}


def recipe(folder: Path, seed: int, **train: Any) -> RunConfig:
    """A run of 12 rollouts an iteration, in leases of 4; by default two responses to a prompt."""
    settings = {
        "iterations": 4,
        "prompts_per_iteration": 6,
        "samples_per_prompt": 2,
        "minibatches": 2,
        "ppg": None,
    }
    return RunConfig.model_validate(
        {
            "name": "run",
            "output": str(folder),
            "seed": seed,
            "model": {"vocab_size": 290, "dim": 8, "layers": 1, "heads": 1, "context": 64},
            "rollout": {"lease_size": 4, "max_response_tokens": TOKENS},
            "learner": {"max_restarts": 5},
            "train": settings | train,
        }
    )


def cuts(leases: Sequence[tuple[str, ...]], size: int) -> set[int]:
    """Into how many of the leases first cut each of these reaches: {1} is right."""
    return {len({int(i[-6:]) // size for i in lease}) for lease in leases}
