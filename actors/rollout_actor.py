"""A worker that samples rollouts from a frozen copy of the policy.

Consumes: a lease (table of RolloutRequest) with the manifest of the weights it must hold.
Produces: `LeaseFacts` for the controller and a table of Rollout for the reward service.
Waits for: the weight slices, when it does not hold them yet. Unblocked by: the object store.

Stateless apart from the weights: killing it loses nothing, and a replacement pulls what it lacks
with its first lease, because every lease names the version it must be sampled from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from actors.generation.decoder import slots_within
from actors.generation.engine import GenerationEngine, Stops
from common.config.model import LoraConfig, ModelConfig
from common.config.workers import RolloutConfig
from common.data.tokenizer import Tokenizer
from common.logprobs import sampling_of
from common.models.adapters import adapter_tensors, add_adapter, base_fingerprint
from common.models.build import build_decoder
from common.models.decoder import Decoder
from common.models.lora import OFF
from common.models.weight_files import load_decoder
from common.out_of_memory import memory_for
from common.wire.trajectory import Rollout, RolloutRequest, extend, from_table, to_table
from common.wire.weights import CorruptSliceError, FlatBuffer, Manifest, Payload, torch_dtype


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
    reloads: int
    """Times that a slice arrived corrupted and was read again."""


_LOADS = 3
"""Readings of the weights before a corrupted slice is taken for what was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOnWire:
    """What an actor needs to sample from adapters."""

    name: str
    """Of the adapter on the wire."""
    lora: LoraConfig
    base: str
    """Weights of the supervised policy, which the adapters are trained on; a file that every node
    can read."""


def engine_of(
    decoder: Decoder, tokenizer: Tokenizer, rollout: RolloutConfig, *, merged: str | None = OFF
) -> GenerationEngine:
    """The engine that settings describe; `merged` as in `GenerationEngine`.

    Raises:
        ConfigError: the cache does not hold one sequence, or native kernels were asked for and
            nothing is to be merged.
        ClusterError: native kernels were asked for and cannot be had.
    """
    within = slots_within(decoder.sizes, rollout.cache_mb, torch_dtype(rollout.precision))
    return GenerationEngine(
        decoder,
        eos_id=tokenizer.eos_id,
        sampling=sampling_of(rollout, tokenizer.eos_id),
        max_tokens=rollout.max_response_tokens,
        slots=min(rollout.slots, rollout.lease_size, within),
        prefill_tokens=rollout.prefill_tokens,
        stops=Stops(ids=rollout.stop_ids, strings=rollout.stop, decode=tokenizer.decode),
        kernels=rollout.kernels,
        merged=merged,
    )


_memory = memory_for("a rollout actor", "lower rollout.cache_mb, or rollout.prefill_tokens")


class RolloutActor:
    """Generation engine, weights and tokenizer of one worker."""

    @_memory
    def __init__(
        self,
        actor_id: str,
        model: ModelConfig,
        tokenizer_path: str,
        rollout: RolloutConfig,
        threads: int,
        adapted: AdapterOnWire | None = None,
    ) -> None:
        """With `adapted`, weights on the wire are an adapter's, for one base that stays here."""
        torch.set_num_threads(threads)
        self.actor_id = actor_id
        self.tokenizer = Tokenizer.load(tokenizer_path)
        dtype = torch_dtype(rollout.precision)
        decoder, base, on_wire = build_decoder(model), "", OFF
        if adapted is not None:
            on_wire = adapted.name
            load_decoder(decoder, Path(adapted.base))
            base = base_fingerprint(decoder.state_dict())
            add_adapter(decoder, on_wire, adapted.lora, seed=0)
        decoder = decoder.eval().requires_grad_(False).to(dtype)
        wire = adapter_tensors(decoder, on_wire) if on_wire else decoder.named_parameters()
        self.buffer = FlatBuffer(wire, dtype, base)
        self._merges = adapted is None or rollout.lora == "merged"
        self._engine_of = partial(engine_of, decoder, self.tokenizer, rollout)
        self.engine = self._engine_of(merged=on_wire if self._merges else None)
        self.policy_version = -1
        self.fingerprint = ""
        self.reloads = 0
        """Corrupted slices found over the actor's life."""

    def load(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        """Hold these weights; returns the fingerprint of what is now held.

        A corrupted slice is found before anything is sampled, and everything is read again.

        Raises:
            CorruptSliceError: a slice stays corrupted; names its rank.
        """
        self.policy_version, self.fingerprint = -1, ""
        for left in reversed(range(_LOADS)):
            try:
                found = self.buffer.load(manifest, payloads)
                break
            except CorruptSliceError as error:
                self.reloads += 1
                if not left:
                    raise CorruptSliceError(f"{error} at {self.actor_id}, {_LOADS} times") from None
        self.engine.refresh()
        self.policy_version, self.fingerprint = manifest.policy_version, found
        return found

    @_memory
    def generate(
        self, requests: pa.Table, manifest: Manifest, *payloads: Payload
    ) -> tuple[LeaseFacts, pa.Table]:
        """Sample every request of a lease from the weights the manifest names."""
        begin, reloads = time.perf_counter(), self.reloads
        if self.fingerprint != manifest.fingerprint:
            self.load(manifest, payloads)
        # A version may be republished with the same content (a resumed run).
        self.policy_version = manifest.policy_version
        loaded = time.perf_counter()
        leased = from_table(requests, RolloutRequest)
        self._serve({request.adapter for request in leased})
        generated = self.engine.generate(leased)
        texts = [self.engine.text(g) for g in generated]
        rollouts = [
            extend(
                request,
                Rollout,
                response_ids=g.response_ids,
                response_text=text,
                behavior_logprobs=g.logprobs,
                unfiltered_logprobs=g.unfiltered,
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
            reloads=self.reloads - reloads,
        )
        return facts, to_table(rollouts, Rollout)

    def _serve(self, adapters: Set[str]) -> None:
        """Have the engine that a lease needs: with its one adapter merged, or, where it names
        several or is not to merge any, with all of them beside the weights that are here."""
        merged = next(iter(adapters)) if self._merges and len(adapters) == 1 else None
        if merged != self.engine.merged:
            del self.engine  # Before the other comes: `rollout.cache_mb` is planned for one.
            self.engine = self._engine_of(merged=merged)
