"""A worker that samples rollouts from a frozen copy of the policy.

Consumes: a lease (table of RolloutRequest) with the manifest of the weights it must hold.
Produces: `LeaseFacts` for the controller and a table of Rollout for the reward service.
Waits for: the weight slices, when it does not have them yet. Unblocked by: the object store.

Stateless apart from the weights: killing it loses nothing, and a replacement pulls what it lacks
with its first lease, because every lease names the version it must be sampled from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from actors.generation.interface import Generator
from common.devices import Compute
from common.out_of_memory import memory_for
from common.wire.trajectory import Rollout, RolloutRequest, extend, from_table, to_table
from common.wire.weights import CorruptSliceError, Manifest, Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseFacts:
    """What the controller needs to know of a finished lease; no tensors."""

    actor_id: str
    policy_version: int
    weights_fingerprint: str
    rollout_ids: tuple[str, ...]
    response_tokens: int
    seconds: float
    """Time spent generating."""
    load_seconds: float
    """Time spent loading weights; 0 when the actor had them already."""
    reloads: int
    """Times that a slice arrived corrupted and was read again."""
    memory: Mapping[str, int]
    """Bytes by what takes them (`Generator.memory`)."""


_READINGS = 3
"""Readings of the weights before a corrupted slice is taken for what was published."""
_memory = memory_for("a rollout actor", "lower rollout.cache_mb, or rollout.prefill_tokens")


class RolloutActor:
    """A generator in a worker, and what it says about every response."""

    @_memory
    def __init__(
        self, actor_id: str, build: Callable[[Compute], Generator], compute: Compute
    ) -> None:
        """Build the generator here, in the worker's own process."""
        compute.apply()
        self.actor_id = actor_id
        self.generator = build(compute)
        self.policy_version = -1
        self.fingerprint = ""
        self.reloads = 0
        """Corrupted slices over the actor's life."""

    def load(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        """Hold these weights, and return the fingerprint of what is now held.

        A corrupted slice is noticed before anything is sampled, and everything is read again.

        Raises:
            CorruptSliceError: a slice stays corrupted; names its rank.
        """
        self.policy_version, self.fingerprint = -1, ""
        for left in reversed(range(_READINGS)):
            try:
                fingerprint = self.generator.hold(manifest, payloads)
                break
            except CorruptSliceError as error:
                self.reloads += 1
                if not left:
                    raise CorruptSliceError(
                        f"{error} at {self.actor_id}, {_READINGS} times"
                    ) from None
        self.policy_version, self.fingerprint = manifest.policy_version, fingerprint
        return fingerprint

    @_memory
    def generate(
        self, requests: pa.Table, manifest: Manifest, *payloads: Payload
    ) -> tuple[LeaseFacts, pa.Table]:
        """Sample every request of a lease from the weights that the manifest names."""
        begin, reloads = time.perf_counter(), self.reloads
        if self.fingerprint != manifest.fingerprint:
            self.load(manifest, payloads)
        # A version may be republished with the same content (a resumed run).
        self.policy_version = manifest.policy_version
        loaded = time.perf_counter()
        leased = from_table(requests, RolloutRequest)
        generated = self.generator.generate(leased)
        rollouts = [
            extend(
                request,
                Rollout,
                response_ids=g.response_ids,
                response_text=self.generator.text(g),
                behavior_logprobs=g.logprobs,
                unfiltered_logprobs=g.unfiltered,
                finish_reason=g.finish_reason,
                policy_version=self.policy_version,
                weights_fingerprint=self.fingerprint,
                actor_id=self.actor_id,
            )
            for request, g in zip(leased, generated, strict=True)
        ]
        facts = LeaseFacts(
            actor_id=self.actor_id,
            policy_version=self.policy_version,
            weights_fingerprint=self.fingerprint,
            rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
            response_tokens=sum(len(g.response_ids) for g in generated),
            seconds=time.perf_counter() - loaded,
            load_seconds=loaded - begin,
            reloads=self.reloads - reloads,
            memory=self.generator.memory(),
        )
        return facts, to_table(rollouts, Rollout)
