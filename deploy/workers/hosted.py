"""Elastic workers as Ray actors, which live on after their own refusal to start, to say why.

Of what a constructor raises Ray keeps the text alone, as the reason of a death, and a pool replaces
what died. A refusal that each successor would repeat (a function that cannot be imported, memory
that is not there) is kept instead, and `whereabouts` raises it where the pool can tell what it is.

The classes keep their names: Ray's dashboard and the titles of processes show them.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import ray

from actors import rollout_actor
from common.errors import ClusterError, ConfigError
from common.live_metrics import Live
from common.wire.weights import Manifest, Payload
from deploy.gauges import Reading
from deploy.workers.told import Told, response_tokens
from reward_service import service


class Hosted:
    """A mixin that keeps what a worker's constructor refused."""

    refusal: ConfigError | ClusterError | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        try:
            super().__init__(*args, **settings)
        except (ConfigError, ClusterError) as error:
            self.refusal = error


class RolloutActor(Told, Hosted, rollout_actor.RolloutActor):
    """A rollout actor in its own process."""

    def generate(
        self, requests: pa.Table, manifest: Manifest, *payloads: Payload
    ) -> tuple[rollout_actor.LeaseFacts, pa.Table]:
        """Sample a lease, and count that."""
        with self.work.call():
            facts, rollouts = super().generate(requests, manifest, *payloads)
        self.work.tokens += facts.response_tokens
        return facts, rollouts

    def readings(self) -> list[Reading]:
        """Tell which weights it holds, too."""
        version = getattr(self, "policy_version", -1)  # not there where its start was refused
        held = Reading.of(Live.HELD_VERSION, version, self.identity.worker)
        return [*super().readings(), held]


class RewardWorker(Told, Hosted, service.RewardWorker):
    """A reward worker in its own process."""

    def score(self, *tables: pa.Table) -> tuple[service.ScoreFacts, pa.Table]:
        """Score tables, and count that."""
        with self.work.call():
            facts, table = super().score(*tables)
        self.work.tokens += response_tokens(tables)
        return facts, table

    def score_held_out(self, *tables: pa.Table) -> tuple[service.ScoreFacts, pa.Table]:
        """Score held-out responses, and count that."""
        with self.work.call():
            facts, table = super().score_held_out(*tables)
        self.work.tokens += response_tokens(tables)
        return facts, table


def whereabouts(worker: object) -> tuple[str, int]:
    """Return, in a worker, its node and its process. Raises what its constructor refused."""
    if isinstance(worker, Hosted) and worker.refusal is not None:
        raise worker.refusal
    return ray.get_runtime_context().get_node_id(), os.getpid()
