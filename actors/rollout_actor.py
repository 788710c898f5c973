"""A worker that samples rollouts from a frozen copy of the policy.

Consumes: a lease (table of RolloutRequest) with the manifest of the weights it must hold.
Produces: `LeaseFacts` for the controller and a table of Rollout for the reward service.
Waits for: the weight slices, when it does not hold them yet. Unblocked by: the object store.

Stateless apart from the weights: killing it loses nothing, and a replacement pulls what it lacks
with its first lease, because every lease names the version it must be sampled from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from actors.engine import Engine
from common.logprobs import Sampling
from common.model_config import ModelConfig
from common.palm import PaLM
from common.tokenizer import Tokenizer
from common.trajectory import Rollout, RolloutRequest, extend, from_table, to_table
from common.weights import Bytes, FlatBuffer, Manifest


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
    """Time spent loading weights; 0 when they were held already."""


class RolloutActor:
    """Generation engine, weights and tokenizer of one worker."""

    def __init__(
        self,
        actor_id: str,
        model: ModelConfig,
        tokenizer_path: str,
        sampling: Sampling,
        max_tokens: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.actor_id = actor_id
        self.tokenizer = Tokenizer.load(tokenizer_path)
        palm = PaLM(model).eval().requires_grad_(False)
        self.buffer = FlatBuffer(palm)
        self.engine = Engine(
            palm, eos_id=self.tokenizer.eos_id, sampling=sampling, max_tokens=max_tokens
        )
        self.policy_version = -1
        self.fingerprint = ""

    def ping(self) -> str:
        """Answer once the worker has started."""
        return self.actor_id

    def load(self, manifest: Manifest, payloads: Sequence[Bytes]) -> str:
        """Hold these weights; returns the fingerprint of what is now held."""
        self.policy_version, self.fingerprint = -1, ""
        self.fingerprint = self.buffer.load(manifest, payloads)
        self.policy_version = manifest.policy_version
        return self.fingerprint

    def generate(
        self, requests: pa.Table, manifest: Manifest, *payloads: Bytes
    ) -> tuple[LeaseFacts, pa.Table]:
        """Sample every request of a lease from the weights the manifest names."""
        begin = time.perf_counter()
        if self.fingerprint != manifest.fingerprint:
            self.load(manifest, payloads)
        # A version may be republished with the same content (a resumed run).
        self.policy_version = manifest.policy_version
        loaded = time.perf_counter()
        leased = from_table(requests, RolloutRequest)
        generated = self.engine.generate(leased)
        texts = [self.tokenizer.decode(g.response_ids) for g in generated]
        rollouts = [
            extend(
                request,
                Rollout,
                response_ids=g.response_ids,
                response_text=text,
                behavior_logprobs=g.logprobs,
                finish_reason=g.finish_reason,
                policy_version=self.policy_version,
                weights_fingerprint=self.fingerprint,
                actor_id=self.actor_id,
            )
            for request, g, text in zip(leased, generated, texts, strict=True)
        ]
        facts = LeaseFacts(
            actor_id=self.actor_id,
            policy_version=self.policy_version,
            weights_fingerprint=self.fingerprint,
            rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
            response_tokens=sum(len(g.response_ids) for g in generated),
            seconds=time.perf_counter() - loaded,
            load_seconds=loaded - begin,
        )
        return facts, to_table(rollouts, Rollout)
