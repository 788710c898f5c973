"""Calls at workers and what they leave, as the collector holds them: references and facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from common.wire.trajectory import RolloutRequest
from common.wire.weights import Manifest
from deploy.control.ledger import Lease


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
    """Rows of the table."""
    iteration: int
    """Iteration that the rollouts were issued for."""
    policy_version: int
    """Version that sampled every one of them."""
    leases: tuple[Lease, ...]
    """What they were leased as; dead letters among them are not in the table."""
    lone: frozenset[str] = frozenset()
    """Rows that are not trained: nothing of their prompt is left to compare them with."""

    @property
    def requests(self) -> list[RolloutRequest]:
        """What the rows of the table were asked for by."""
        rows = set(self.rollout_ids)
        return [r for lease in self.leases for r in lease.requests if r.rollout_id in rows]

    @property
    def trained(self) -> list[str]:
        """Rows that are trained."""
        return [rollout_id for rollout_id in self.rollout_ids if rollout_id not in self.lone]


@dataclass(frozen=True, slots=True)
class Sampling:
    """A lease at a rollout worker."""

    worker: str
    lease: Lease
    weights: Weights
    table: ray.ObjectRef[Any]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A lease's rollouts, to be scored."""

    lease: Lease
    version: int
    tokens: int
    """Of all prompts and responses."""
    table: ray.ObjectRef[Any]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Tables at a reward worker."""

    worker: str
    sampled: tuple[Sampled, ...]
    table: ray.ObjectRef[Any]


def first_share(tables: Sequence[Sampled], workers: int, most: int) -> int:
    """How many of the first of these tables go into one call, when so many workers are free.

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
