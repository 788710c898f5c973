"""Elastic workers as Ray actors, which live on after their own refusal to start, to say why.

Of what a constructor raises Ray keeps the text alone, as the reason of a death, and a pool replaces
what died. A refusal that each successor would repeat (a function that cannot be imported, memory
that is not there) is kept instead, and `whereabouts` raises it where the pool can tell what it is.

The classes keep their names: Ray's dashboard and the titles of processes show them.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from actors import rollout_actor
from common.errors import ClusterError, ConfigError
from reward_service import service


class Hosted:
    """A mixin that keeps what a worker's constructor refused."""

    refusal: ConfigError | ClusterError | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        try:
            super().__init__(*args, **settings)
        except (ConfigError, ClusterError) as error:
            self.refusal = error


class RolloutActor(Hosted, rollout_actor.RolloutActor):
    """A rollout actor in its own process."""


class RewardWorker(Hosted, service.RewardWorker):
    """A reward worker in its own process."""


def whereabouts(worker: object) -> tuple[str, int]:
    """Return, in a worker, its node and its process. Raises what its constructor refused."""
    if isinstance(worker, Hosted) and worker.refusal is not None:
        raise worker.refusal
    return ray.get_runtime_context().get_node_id(), os.getpid()
