"""Generation: prompts in, sampled responses with exact log-probabilities out.

Continuous batching over a fixed set of slots: a response that ends frees its slot at once for the
next request, whatever its length; prompts are prefilled in chunks beside running decodes, so that a
long one does not stall the others; samples of one prompt prefill it once. Where adapters are not
merged, each request is sampled with its own, side by side with others.

`generate` runs a lease to its end, so that its result is a function of the lease and the weights
alone: not of the actor it ran on, nor of other requests (invariant I5). `submit` and `step` are the
same loop for callers that add requests while it runs.

Shape suffixes: B rows that draw a token, S slots in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from actors.generation.cached_decoder import CachedDecoder
from actors.generation.interface import Generated
from actors.generation.scheduler import Scheduler
from actors.generation.slots import Slots, Waiting
from actors.generation.stops import Stops
from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.models.lora import OFF
from common.native.coverage import Kernels
from common.native.model import BLOCK
from common.native.panels import Spent
from common.randomness import uniforms
from common.wire.trajectory import FinishReason, RolloutRequest


class GenerationEngine:
    """Samples from a frozen policy."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        eos_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        slots: int = 128,
        prefill_tokens: int = 2048,
        stops: Stops | None = None,
        kernels: Kernels = "auto",
        merged: str | None = OFF,
        cache_mb: float | None = None,
        block: int = BLOCK,
        spent: Spent | None = None,
        graphs: bool = True,
    ) -> None:
        """Compute in the dtype and on the device of `decoder`'s parameters.

        Args:
            decoder: the policy.
            eos_ids: tokens that end a response, for the reason "eos".
            sampling: distribution that tokens are drawn from.
            max_tokens: longest response, when a request does not name its own.
            slots: sequences that are sampled at once, where the cache has room for them.
            prefill_tokens: prompt tokens that one step may compute beside its decodes.
            stops: what else ends a response.
            kernels: as in `CachedDecoder`.
            merged: the adapter that every request is sampled with; None: each with its own (see
                `CachedDecoder`).
            cache_mb: as in `CachedDecoder`.
            block: as in `CachedDecoder`.
            spent: as in `CachedDecoder`.
            graphs: as in `CachedDecoder`.

        Raises:
            ValueError: a size under 1, or `decoder` has no such adapter.
            ClusterError: native kernels were asked for and cannot be compiled.
            ConfigError: they were asked for and cannot run this, or the cache does not hold one
                sequence.
        """
        if min(max_tokens, slots, prefill_tokens) < 1:
            raise ValueError("max_tokens, slots and prefill_tokens must be at least 1")
        self.decoder = decoder
        self.cached = CachedDecoder(
            decoder,
            slots=slots,
            kernels=kernels,
            merged=merged,
            cache_mb=cache_mb,
            block=block,
            spent=spent,
            graphs=graphs,
        )
        self.eos_ids = tuple(eos_ids)
        self.max_tokens = max_tokens
        self.stops = stops or Stops()
        self._prefill_tokens = prefill_tokens
        self._begin(sampling)

    @property
    def merged(self) -> str | None:
        """The one adapter that requests may name; None: any that `decoder` has, or none."""
        return self.cached.merged

    def sample_by(self, sampling: Sampling) -> None:
        """Draw tokens from another distribution from now on.

        Raises:
            ValueError: responses are being sampled.
        """
        if not self.idle:
            raise ValueError("the distribution cannot change while responses are being sampled")
        self._begin(sampling)

    def _begin(self, sampling: Sampling) -> None:
        slots, context = self.cached.slots, self.decoder.sizes.context
        self.sampling = sampling
        self._slots = Slots(slots, context, filters=sampling.filters)
        self._scheduler = Scheduler(
            self._slots, self.cached.implementation, slots, self._prefill_tokens
        )

    @property
    def idle(self) -> bool:
        """Whether no request waits or is being sampled."""
        return not self._scheduler.queue and not len(self._slots)

    def refresh(self) -> None:
        """Run with the weights that the decoder has now.

        Raises:
            ValueError: responses are being sampled; each must come from one version.
        """
        if not self.idle:
            raise ValueError("weights cannot change while responses are being sampled")
        self.cached.refresh()

    def forget(self) -> None:
        """Give back weights that it keeps for itself; `refresh` comes before the next request."""
        self.cached.implementation.forget()

    def generate(
        self, requests: Sequence[RolloutRequest], limits: Sequence[int] | None = None
    ) -> list[Generated]:
        """Sample one response per request; results in the requests' order.

        Raises:
            ValueError: as `submit`, or other requests are being sampled.
        """
        if not requests:
            raise ValueError("nothing to generate")
        if not self.idle:
            raise ValueError("other requests are being sampled")
        self.submit(requests, limits)
        responses: dict[str, Generated] = {}
        while not self.idle:
            responses |= {response.rollout_id: response for response in self.step()}
        self.cached.rest()
        return [responses[request.rollout_id] for request in requests]

    def submit(
        self, requests: Sequence[RolloutRequest], limits: Sequence[int] | None = None
    ) -> None:
        """Queue requests; `limits` are longest responses, one per request.

        Raises:
            ValueError: an empty prompt, one that leaves no room for its response, a limit under
                1, an adapter that is not here, or a rollout_id that is here already. Nothing is
                queued then.
        """
        limits = limits or [self.max_tokens] * len(requests)
        known = {waiting.request.rollout_id for waiting in self._scheduler.queue}
        known |= {request.rollout_id for request in self._slots.requests}
        indices = {name: index for index, name in enumerate(self.cached.adapters)}
        for request, limit in zip(requests, limits, strict=True):
            if problem := self._problem(request, limit):
                raise ValueError(f"rollout {request.rollout_id}: {problem}")
            if request.rollout_id in known:
                raise ValueError(f"rollout {request.rollout_id} is here already")
            known.add(request.rollout_id)
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        places = np.arange(max(limits, default=0), dtype=np.uint64)
        drawn = uniforms(seeds[:, None], places[None])
        adapters = [indices[request.adapter] for request in requests]
        self._scheduler.queue += map(Waiting, requests, limits, drawn, adapters)

    def text(self, generated: Generated) -> str:
        """Return the response as text, without the stop string that ended it."""
        ids, end = generated.response_ids, None
        if generated.finish_reason == "stop":
            end = self.stops.completed_at(ids)
        return self.stops.decode(ids)[:end]

    def step(self) -> list[Generated]:
        """Advance every slot by a token, and prompts by a chunk; return what has ended."""
        chunks, copies = self._scheduler.plan()
        slots, used = self._slots, len(self._slots)
        if not used:
            return []
        positions = slots.filled[:used] - 1
        logits_BV = self.cached.forward(
            slots.newest[:used], positions, chunks, copies, slots.adapters[:used]
        )
        drawing: np.ndarray | slice = slice(used)
        if self._scheduler.prefilling:
            drawing = np.flatnonzero(slots.filled[:used] >= slots.lengths[:used])
            if not len(drawing):
                return []
            logits_BV = logits_BV[torch.from_numpy(drawing).to(logits_BV.device)]
        cells = slots.cells(drawing)
        places = slots.counts[drawing]
        tokens, logprobs, whole = self.cached.draw(
            logits_BV, self.sampling, places, slots.uniforms_at(cells)
        )
        slots.record(drawing, cells, tokens, logprobs, whole)
        ended = self._ended(drawing, tokens)
        responses = [self._response(slot, reason) for slot, reason in ended]
        self._free([slot for slot, _ in ended])
        return responses

    # ------------------------------------------------------------------ parts of a step

    def _problem(self, request: RolloutRequest, limit: int) -> str:
        """Why a request cannot be sampled; empty when it can."""
        room, length = self.decoder.sizes.context - limit, len(request.prompt_ids)
        if limit < 1:
            return "a response needs at least 1 token"
        if not 0 < length <= room:
            return f"prompt of {length} tokens; 1 to {room} fit"
        if request.adapter not in self.cached.adapters:
            return f"no adapter '{request.adapter}' among {self.cached.adapters}"
        return ""

    def _ended(
        self, drawing: np.ndarray | slice, tokens_B: np.ndarray
    ) -> list[tuple[int, FinishReason]]:
        """Slots whose response ends with these tokens, and why."""
        slots, numbers = self._slots, np.arange(len(self._slots))[drawing]
        eos, stop = np.zeros((2, len(tokens_B)), dtype=bool)
        for ends, ids in ((eos, self.eos_ids), (stop, self.stops.ids)):
            for token in ids:
                ends |= tokens_B == token
        if self.stops.strings:
            stop |= [self._completes_a_stop(slot) for slot in numbers.tolist()]
        done = eos | stop | (slots.counts[drawing] >= slots.limits[drawing])
        return [
            (int(numbers[i]), "eos" if eos[i] else "stop" if stop[i] else "length")
            for i in np.flatnonzero(done)
        ]

    def _response(self, slot: int, reason: FinishReason) -> Generated:
        slots, count = self._slots, self._slots.counts[slot]
        whole = slots.unfiltered
        return Generated(
            rollout_id=slots.requests[slot].rollout_id,
            response_ids=slots.tokens[slot, :count].tolist(),
            logprobs=slots.logprobs[slot, :count].tolist(),
            unfiltered=None if whole is None else whole[slot, :count].tolist(),
            finish_reason=reason,
        )

    def _completes_a_stop(self, slot: int) -> bool:
        count = int(self._slots.counts[slot])
        # Every token is at least a byte of the string that the last one completes.
        tail = self._slots.tokens[slot, max(0, count - self.stops.longest) : count].tolist()
        return count >= self.sampling.min_tokens and self.stops.completed_at(tail) is not None

    def _free(self, ended: Sequence[int]) -> None:
        """Empty slots; the last in use move into them, so that slots in use stay together."""
        forward = self.cached.implementation
        for slot in sorted(ended, reverse=True):
            last = len(self._slots) - 1
            if self._slots.remove(slot):
                forward.move(last, slot, int(self._slots.filled[slot]))
            else:
                forward.clear(slot)
