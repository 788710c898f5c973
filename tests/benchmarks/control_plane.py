"""The control plane alone: ledger, leases, collection and reward path with null engines.

Workers answer at once with a table of the right shape; as many as are asked for share a few
processes, because what is measured is the controller's side of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import ray

from actors.rollout_actor import LeaseFacts
from common.data.prompts import EncodedPrompt, PromptStream
from common.wire.trajectory import SCHEMAS, Rollout, RolloutRequest, ScoredTrajectory
from common.wire.weights import Manifest
from deploy.control.collector import Collector
from deploy.control.jobs import Weights
from deploy.control.ledger import Ledger
from deploy.workers.pool import Pool
from reward_service.service import ScoreFacts
from tests.benchmarks.measure import Result, interleaved, start_ray

ROLLOUTS, ITERATIONS, LEASE, REPEATS = 32_768, 4, 64, 3
LENGTH = 16
MANIFEST = Manifest(policy_version=0, total=0, layout="", slices=())


def widened(
    table: pa.Table,
    before: type[RolloutRequest],
    after: type[RolloutRequest],
    constant: dict[str, Any],
) -> pa.Table:
    """A table of a later kind: constant columns for what it has more, null where it may be."""
    for field in list(SCHEMAS[after])[len(SCHEMAS[before]) :]:
        value = constant.get(field.name) if field.nullable else constant[field.name]
        column = pa.array([value] * len(table), type=field.type)
        table = table.append_column(field, column)
    return table.cast(SCHEMAS[after])


class NullRollout:
    """Instant rollouts."""

    def generate(self, requests: pa.Table, manifest: Manifest) -> tuple[LeaseFacts, pa.Table]:
        constant = {
            "response_ids": list(range(LENGTH)),
            "response_text": "text",
            "behavior_logprobs": [-1.0] * LENGTH,
            "unfiltered_logprobs": None,
            "finish_reason": "eos",
            "policy_version": 0,
            "weights_fingerprint": manifest.fingerprint,
            "actor_id": "null",
        }
        facts = LeaseFacts(
            actor_id="null",
            policy_version=0,
            weights_fingerprint=manifest.fingerprint,
            rollout_ids=tuple(requests["rollout_id"].to_pylist()),
            response_tokens=LENGTH * len(requests),
            seconds=0.0,
            load_seconds=0.0,
            memory={},
            reloads=0,
        )
        return facts, widened(requests, RolloutRequest, Rollout, constant)


class NullReward:
    """Instant scores."""

    def score(self, *tables: pa.Table) -> tuple[ScoreFacts, pa.Table]:
        constant = {
            "score": 1.0,
            "score_components": [("null", 1.0)],
            "ref_logprobs": [-1.0] * LENGTH,
            "reward_version": 0,
        }
        table = widened(pa.concat_tables(tables), Rollout, ScoredTrajectory, constant)
        facts = ScoreFacts(
            rollout_ids=tuple(table["rollout_id"].to_pylist()),
            scores=tuple(table["score"].to_pylist()),
            dead_letters={},
            seconds=0.0,
        )
        return facts, table


def drive(actors: int, rollout: list[Any], reward: list[Any]) -> None:
    """Issue, lease, sample, score, commit and train `ROLLOUTS` rollouts."""
    turns = itertools.cycle(rollout)
    workers = Pool(kind="rollout", make=lambda name: next(turns), max_failures=0)
    workers.scale(actors)
    scorers = Pool(kind="reward", make=lambda name: reward[0], max_failures=0)
    scorers.scale(1)
    ledger = Ledger()
    collector = Collector(ledger, workers, scorers, deadline_s=300.0, score_together=True)
    collector.weights = Weights(manifest=MANIFEST, payloads=())
    prompt = EncodedPrompt(uid="p", text="a prompt", ids=list(range(LENGTH)))
    prompts = PromptStream([prompt] * 1000, seed=0)
    for iteration in range(ITERATIONS):
        requests = prompts.requests(iteration, ROLLOUTS // ITERATIONS, 1)
        ledger.issue(iteration, requests, LEASE)
    while ledger.trained < ROLLOUTS:
        collector.pump()
        ledger.train(i for scored in collector.batches.waiting for i in scored.rollout_ids)
        collector.batches.waiting = []
    ledger.check()
    assert ledger.trained == ledger.issued == ROLLOUTS


def run() -> list[Result]:
    start_ray(2**30)
    rollout = [ray.remote(NullRollout).options(num_cpus=0).remote() for _ in range(2)]
    reward = [ray.remote(NullReward).options(num_cpus=0).remote()]
    runs = {str(n): lambda n=n: drive(n, rollout, reward) for n in (4, 64, 512)}
    drive(4, rollout, reward)
    found = interleaved(runs, REPEATS)
    ray.shutdown()
    rates = {name: ROLLOUTS / took for name, took in found.items()}
    return [
        Result(
            key="control_plane_per_second",
            value=rates["64"],
            metric="control plane, null engines, 64 actors",
            ours=f"{rates['64']:,.0f} trajectories/s",
            baseline=f"{rates['4']:,.0f} with 4 actors",
        ),
        Result(
            key="control_plane_512_vs_4",
            value=found["512"] / found["4"],
            metric="cost of a trajectory with 512 actors",
            ours=f"{found['512'] / ROLLOUTS * 1e6:,.0f} us",
            baseline=f"{found['4'] / ROLLOUTS * 1e6:,.0f} us with 4 actors",
        ),
    ]
