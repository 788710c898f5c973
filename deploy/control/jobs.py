"""Calls at workers and what they leave behind, as the collector knows them: references, facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray

from common.wire.trajectory import RolloutRequest
from common.wire.weights import Manifest, Payload
from deploy.control.leases import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights that actors must sample from: the manifest and the references to its slices."""

    manifest: Manifest
    payloads: tuple[ray.ObjectRef[Payload], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Committed trajectories of one scoring call; the table stays in the object store."""

    table: ray.ObjectRef[pa.Table]
    rollout_ids: tuple[str, ...]
    """Rows of the table."""
    iteration: int
    """Iteration that the rollouts were issued for."""
    policy_version: int
    """Version that sampled every one of them."""
    leases: tuple[Lease, ...]
    """What they were leased as; dead letters among them are not in the table."""
    scores: tuple[float, ...] = ()
    """Of the rows; none where nothing was scored."""
    left_out: frozenset[str] = frozenset()
    """Rows that are not trained: nothing of their prompt is left to compare them with, or all of it
    has the same score."""

    @property
    def requests(self) -> list[RolloutRequest]:
        """Requests of the rows of the table."""
        rows = set(self.rollout_ids)
        return [r for lease in self.leases for r in lease.requests if r.rollout_id in rows]

    @property
    def trained(self) -> list[str]:
        """Rows that are trained."""
        return [rollout_id for rollout_id in self.rollout_ids if rollout_id not in self.left_out]


@dataclass(frozen=True, slots=True)
class Sampling:
    """A lease at a rollout worker."""

    worker: str
    lease: Lease
    weights: Weights
    table: ray.ObjectRef[pa.Table]
    since: float
    """When it was handed out; unix seconds."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A lease's rollouts, to be scored."""

    lease: Lease
    version: int
    tokens: int
    """Of all prompts and responses."""
    table: ray.ObjectRef[pa.Table]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Tables at a reward worker."""

    worker: str
    sampled: tuple[Sampled, ...]
    table: ray.ObjectRef[pa.Table]
    since: float
    """When it was handed out; unix seconds."""


def first_share(tables: Sequence[Sampled], workers: int, most: int) -> int:
    """Return how many of the first of these tables go into one call, when so many workers are free.

    An even share of their tokens, so that no worker idles beside one that has them all, and at most
    `most` tokens, so that one deadline fits every call. One table is a call whatever its size.
    """
    share = min(most, math.ceil(sum(t.tokens for t in tables) / workers))
    total = 0
    for count, table in enumerate(tables):
        total += table.tokens
        if count and total > share:
            return count
    return len(tables)
