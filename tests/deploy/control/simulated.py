"""A rollout actor whose time is a sleep: what is tested is what moves work to it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
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
from deploy.control.tally import Throughput
from deploy.workers.pool import Pool
from deploy.workers.worker import Event
from reward_service.service import ScoreFacts

TOKENS = 10
LEASE = 4


class SleepingActor:
    """The interface of `actors.rollout_actor.RolloutActor`; every response has `TOKENS` tokens."""

    def __init__(self, actor_id: str, seconds_per_token: float, text: str) -> None:
        self.actor_id = actor_id
        self.seconds_per_token = seconds_per_token
        self.text = text

    def generate(
        self, requests: pa.Table, manifest: Manifest, *payloads: Any
    ) -> tuple[LeaseFacts, pa.Table]:
        seconds = TOKENS * self.seconds_per_token
        time.sleep(seconds)
        constant = {
            "response_ids": list(range(TOKENS)),
            "response_text": self.text,
            "behavior_logprobs": [-1.0] * TOKENS,
            "unfiltered_logprobs": None,
            "finish_reason": "eos",
            "policy_version": manifest.policy_version,
            "weights_fingerprint": manifest.fingerprint,
            "actor_id": self.actor_id,
        }
        table = _widened(requests, RolloutRequest, Rollout, constant)
        facts = LeaseFacts(
            actor_id=self.actor_id,
            policy_version=manifest.policy_version,
            weights_fingerprint=manifest.fingerprint,
            rollout_ids=tuple(requests["rollout_id"].to_pylist()),
            response_tokens=TOKENS * len(requests),
            seconds=seconds,
            load_seconds=0.0,
            reloads=0,
            memory={"weights": 1, "cache": 2},
        )
        return facts, table


class SleepingScorer:
    """The interface of `reward_service.service.RewardWorker`; every score is 1."""

    def score(self, *tables: pa.Table) -> tuple[ScoreFacts, pa.Table]:
        constant = {
            "score": 1.0,
            "score_components": [("constant", 1.0)],
            "token_scores": None,
            "score_reason": None,
            "ref_logprobs": [-1.0] * TOKENS,
            "reward_version": 0,
        }
        table = _widened(pa.concat_tables(tables), Rollout, ScoredTrajectory, constant)
        facts = ScoreFacts(
            rollout_ids=tuple(table["rollout_id"].to_pylist()),
            scores=tuple(table["score"].to_pylist()),
            dead_letters={},
            seconds=0.0,
        )
        return facts, table


def _widened(table: pa.Table, narrow: type, wide: type, constant: dict[str, Any]) -> pa.Table:
    for field in list(SCHEMAS[wide])[len(SCHEMAS[narrow]) :]:
        column = pa.array([constant[field.name]] * len(table), type=field.type)
        table = table.append_column(field, column)
    return table.cast(SCHEMAS[wide])


class CountedByActor(Throughput):
    """Counts rollouts by the actor that sampled them, too."""

    def __init__(self, by: Counter[str]) -> None:
        super().__init__()
        self.by = by

    def sampled(self, facts: LeaseFacts) -> None:
        super().sampled(facts)
        self.by[facts.actor_id] += len(facts.rollout_ids)


class Rig:
    """Ledger, collector, a pool of sleeping actors and, where wished for, one of scorers.

    The caller is the controller.
    """

    def __init__(
        self,
        size: int,
        *,
        seconds_per_token: float = 0.005,
        text: str = "text",
        deadline_s: float = 60.0,
        options: Callable[[str], dict[str, Any]] = lambda name: {},
        actor: type = SleepingActor,
        scorers: int = 0,
        scorer: type = SleepingScorer,
        score_last: bool = False,
        **pool: Any,
    ) -> None:
        def make(name: str) -> Any:
            placed = {"num_cpus": 0.1} | options(name)
            return ray.remote(actor).options(**placed).remote(name, seconds_per_token, text)

        self.events: list[Event] = []
        self.by: Counter[str] = Counter()
        """Rollouts by the actor that sampled them."""
        self.pool = Pool(
            kind="rollout",
            make=make,
            **{"max_failures": 10, "report": self.events.append} | pool,
        )
        self.pool.scale(size)
        self.scorers = Pool(
            kind="reward",
            make=lambda name: ray.remote(scorer).options(num_cpus=0.1).remote(),
            max_failures=10,
            report=self.events.append,
        )
        self.scorers.scale(scorers)
        self.ledger = Ledger()
        self.collector = Collector(
            self.ledger,
            self.pool,
            self.scorers if scorers else None,
            deadline_s=deadline_s,
            score_together=bool(scorers),
            score_last=score_last,
        )
        self.collector.throughput = CountedByActor(self.by)
        self.publish(0)
        self.prompts = PromptStream([EncodedPrompt(uid="p", text="a", ids=[1])], seed=0)

    def publish(self, version: int) -> None:
        manifest = Manifest(policy_version=version, total=0, layout="", slices=())
        self.collector.weights = Weights(manifest=manifest, payloads=())

    def issue(self, iteration: int, count: int) -> None:
        self.ledger.issue(iteration, self.prompts.requests(iteration, count, 1), LEASE)

    def pump_until(self, condition: Callable[[], bool], within_s: float = 60.0) -> float:
        """Turn the loop until a condition holds; seconds it took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() < begin + within_s, (self.pool.workers, self.events)
            self.collector.pump(0.02)
            self.ledger.check()
        return time.monotonic() - begin

    def pump_for(self, seconds: float) -> float:
        """Turn the loop for some time; committed rollouts per second."""
        begin, before = time.monotonic(), self.ledger.count("committed")
        while time.monotonic() < begin + seconds:
            self.collector.pump(0.02)
        return (self.ledger.count("committed") - before) / (time.monotonic() - begin)

    def working(self) -> list[str]:
        return [w.name for w in self.pool.workers.values() if w.state == "working"]

    def said(self, what: str) -> list[Event]:
        return [event for event in self.events if event.what == what]

    def stop(self) -> None:
        self.pool.stop()
        self.scorers.stop()

    def everything_once(self, count: int) -> None:
        """All of so many rollouts are committed, each in one table."""
        self.pump_until(lambda: self.ledger.count("committed") == count)
        ids = [i for scored in self.collector.batches.waiting for i in scored.rollout_ids]
        assert len(ids) == len(set(ids)) == count
        assert self.ledger.refused == 0


def is_running(pid: int) -> bool:
    """Whether a process of this machine lives (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lost_object() -> ray.ObjectRef[Any]:
    """What cannot be had any more: whoever made it is dead."""

    @ray.remote(num_cpus=0.1)
    class Maker:
        def make(self) -> list[ray.ObjectRef[Any]]:
            return [ray.put(b"x" * 200_000)]

    maker = Maker.remote()
    (ref,) = ray.get(maker.make.remote())
    ray.kill(maker)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # Ray takes a moment to notice
        try:
            ray.get(ref)
        except ray.exceptions.ObjectLostError:
            return ref
        time.sleep(0.1)
    raise AssertionError("it is still here")


def process_of(handle: Any) -> int:
    pid: int = ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))
    return pid
