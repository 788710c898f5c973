"""Generation: prompts in, sampled responses with exact log-probabilities out.

Continuous batching over a fixed set of slots: a response that ends frees its slot at once for the
next request, whatever its length; prompts are prefilled in chunks beside running decodes, so that a
long one does not stall the others; samples of one prompt prefill it once. Where adapters are not
merged, each request is sampled with its own, side by side with others.

`generate` runs a lease to its end, so that its result is a function of the lease and the weights
alone: not of the actor it ran on, nor of what else is running (invariant I5). `submit` and `step`
are the same loop, opened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.generation.decoder import CachedDecoder, Choice
from actors.generation.forward import Chunk, Copy
from actors.generation.slots import Slots, Waiting
from common.logprobs import Sampling, draw, logprobs_at, sampling_logits
from common.models.decoder import Decoder
from common.models.lora import OFF
from common.randomness import uniforms
from common.wire.trajectory import RolloutRequest

_WORTH_SHARING = 8
"""Shorter common prefixes cost more to look after than to compute again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What the engine made of one request."""

    rollout_id: str
    response_ids: list[int]
    """The token that ended it included."""
    logprobs: list[float]
    """float32 log-probability of each token when it was drawn."""
    unfiltered: list[float] | None
    """Likewise of the whole distribution (`Sampling.unfiltered`); None where nothing filters."""
    finish_reason: str
    """``eos``, ``stop`` (a stop token or string) or ``length``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """What ends a response besides EOS and its length."""

    ids: tuple[int, ...] = ()
    """Tokens, kept in the response as EOS is."""
    strings: tuple[str, ...] = ()
    """Texts, found across token borders; the token that completes one is the response's last."""
    decode: Callable[[Sequence[int]], str] = lambda ids: ""
    """Ids to text."""


class GenerationEngine:
    """Samples from a frozen policy."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        eos_id: int,
        sampling: Sampling,
        max_tokens: int,
        slots: int = 128,
        prefill_tokens: int = 2048,
        stops: Stops | None = None,
        kernels: Choice = "auto",
        merged: str | None = OFF,
    ) -> None:
        """Runs in the dtype and on the device of `decoder`'s parameters.

        Args:
            max_tokens: longest response, when a request does not name its own.
            slots: sequences in work at once; the cache holds each in a full context.
            prefill_tokens: prompt tokens that one step may compute beside its decodes.
            merged: the adapter that every request is sampled with; None: each with its own (see
                `CachedDecoder`).

        Raises:
            ValueError: a size under 1, or `decoder` has no such adapter.
            ClusterError: native kernels were asked for and cannot be had.
            ConfigError: they were asked for and nothing is to be merged.
        """
        if min(max_tokens, slots, prefill_tokens) < 1:
            raise ValueError("max_tokens, slots and prefill_tokens must be at least 1")
        self.decoder = decoder
        self.cached = CachedDecoder(decoder, slots=slots, kernels=kernels, merged=merged)
        self.eos_id = eos_id
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.min_tokens = sampling.min_tokens
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.stops = stops or Stops()
        self._plain = sampling == Sampling(temperature=sampling.temperature or 1.0)
        """Nothing but a temperature: the decoder's own draw will do."""
        self._reach = max((len(s.encode()) for s in self.stops.strings), default=0)
        self._queue: deque[Waiting] = deque()
        self._prefilling = False
        """A slot is in the middle of its prompt."""
        self._work = Slots(slots, decoder.sizes.context, filters=sampling.filters)

    @property
    def merged(self) -> str | None:
        """The one adapter that requests may name; None: whichever `decoder` has, and none."""
        return self.cached.merged

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in work."""
        return not self._queue and not len(self._work)

    def refresh(self) -> None:
        """Take over the weights that `decoder` holds now.

        Raises:
            ValueError: responses are in work; each must come from one version.
        """
        if not self.idle:
            raise ValueError("weights cannot change under responses in work")
        self.cached.refresh()

    def generate(
        self, requests: Sequence[RolloutRequest], limits: Sequence[int] | None = None
    ) -> list[Generated]:
        """Sample one response per request; results in the requests' order.

        Raises:
            ValueError: as `submit`, or other requests are in work.
        """
        if not requests:
            raise ValueError("nothing to generate")
        if not self.idle:
            raise ValueError("other requests are in work")
        self.submit(requests, limits)
        found: dict[str, Generated] = {}
        while not self.idle:
            found |= {made.rollout_id: made for made in self.step()}
        return [found[request.rollout_id] for request in requests]

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
        known = {job.request.rollout_id for job in self._queue}
        known |= {request.rollout_id for request in self._work.requests}
        here = {name: index for index, name in enumerate(self.cached.adapters)}
        for request, limit in zip(requests, limits, strict=True):
            room, length = self.decoder.sizes.context - limit, len(request.prompt_ids)
            if limit < 1:
                raise ValueError(f"rollout {request.rollout_id}: a response needs at least 1 token")
            if not 0 < length <= room:
                raise ValueError(
                    f"rollout {request.rollout_id}: prompt of {length} tokens; 1 to {room} fit"
                )
            if request.adapter not in here:
                raise ValueError(
                    f"rollout {request.rollout_id}: no adapter '{request.adapter}' among {[*here]}"
                )
            if request.rollout_id in known:
                raise ValueError(f"rollout {request.rollout_id} is here already")
            known.add(request.rollout_id)
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        places = np.arange(max(limits, default=0), dtype=np.uint64)
        drawn = uniforms(seeds[:, None], places[None])
        adapters = [here[request.adapter] for request in requests]
        self._queue += map(Waiting, requests, limits, drawn, adapters)

    def text(self, made: Generated) -> str:
        """The response in words, without the stop string that ended it."""
        text = self.stops.decode(made.response_ids)
        at = self._stop_at(made.response_ids) if made.finish_reason == "stop" else None
        return text[:at]

    def step(self) -> list[Generated]:
        """Advance every slot by a token, and prompts by a chunk; what has ended."""
        chunks, copies = self._plan()
        work, used = self._work, len(self._work)
        if not used:
            return []
        positions = work.filled[:used] - 1
        logits_SV = self.cached.forward(
            work.newest[:used], positions, chunks, copies, work.adapters[:used]
        )
        drawing: np.ndarray | slice = slice(used)
        if self._prefilling:
            drawing = np.flatnonzero(work.filled[:used] >= work.lengths[:used])
            if not len(drawing):
                return []
            logits_SV = logits_SV[torch.from_numpy(drawing).to(logits_SV.device)]
        cells = work.cells(drawing)
        places = work.counts[drawing]
        tokens, logprobs = self._draw(logits_SV, places, work.uniforms_at(cells))
        whole = None if work.unfiltered is None else self._whole(logits_SV, tokens, places)
        work.record(drawing, cells, tokens, logprobs, whole)
        ended = self._ended(drawing, tokens)
        made = [self._generated(slot, reason) for slot, reason in ended]
        self._free([slot for slot, _ in ended])
        return made

    # ------------------------------------------------------------------ parts of a step

    def _plan(self) -> tuple[list[Chunk], list[Copy]]:
        """Advance `filled` and `newest` of all slots; the prompt tokens before the newest, and the
        prefixes to copy.

        A prompt that does not fit into the step's budget ends the plan, so at most one is ever
        in the middle of its prefill, and every prefix of another slot is whole after this step.
        """
        work, budget = self._work, self.prefill_tokens
        chunks: list[Chunk] = []
        copies: list[Copy] = []
        begun = work.counts[: len(work)] > 0
        work.filled[: len(work)] += begun
        if self._prefilling:
            self._prefilling = False
            for slot in np.flatnonzero(~begun).tolist():
                budget -= self._prefill(slot, budget, chunks)
        while self._queue and len(work) < self.slots and budget > 0:
            slot = work.add(self._queue.popleft())
            self._share(slot, copies)
            budget -= self._prefill(slot, budget, chunks)
        return chunks, copies

    def _prefill(self, slot: int, budget: int, chunks: list[Chunk]) -> int:
        """Plan the next tokens of a slot's prompt; how many they are."""
        work = self._work
        start, length = int(work.filled[slot]), int(work.lengths[slot])
        end = min(length, start + max(1, budget))
        work.filled[slot] = end
        if end - start > 1:
            part = work.prompts[slot, start : end - 1]
            chunks.append(Chunk(slot=slot, start=start, tokens=part))
        work.newest[slot] = work.prompts[slot, end - 1]
        self._prefilling = end < length
        return end - start

    def _share(self, slot: int, copies: list[Copy]) -> None:
        """Take over what another slot's prompt has in common with this one, computed with the same
        adapter.

        The last token is always computed: its logits are wanted.
        """
        work = self._work
        wanted = work.prompts[slot, : work.lengths[slot] - 1]
        if len(wanted) < _WORTH_SHARING:
            return
        alike = (work.prompts[:slot, :_WORTH_SHARING] == wanted[:_WORTH_SHARING]).all(axis=1)
        others = np.flatnonzero(alike & (work.adapters[:slot] == work.adapters[slot]))
        if not len(others):
            return
        same = (work.prompts[others, : len(wanted)] == wanted).cumprod(axis=1).sum(axis=1)
        same = np.minimum(same, np.minimum(work.lengths[others], work.filled[others]))
        best = int(same.argmax())
        source, shared = int(others[best]), int(same[best])
        if shared < _WORTH_SHARING:
            return
        work.filled[slot] = shared
        targets = [slot]
        if copies and (copies[-1].source, copies[-1].positions) == (source, shared):
            targets = [*copies.pop().targets, slot]
        copies.append(Copy(source=source, targets=targets, positions=shared))

    def _draw(
        self, logits: Tensor, positions: np.ndarray, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token for each row and its log-probability, at these positions of the responses."""
        if self._plain:
            return self.cached.draw(logits, self.sampling, uniforms)
        positions_B = torch.from_numpy(positions).to(logits.device)
        kept = sampling_logits(logits, self.sampling, positions=positions_B)
        tokens, logprobs = draw(kept, torch.from_numpy(uniforms).to(logits.device))
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _whole(self, logits: Tensor, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Log-probabilities of drawn tokens in the whole distribution."""
        chosen, places = (torch.from_numpy(x).to(logits.device) for x in (tokens, positions))
        found = logprobs_at(logits, chosen, self.sampling.unfiltered, places)
        logprobs: np.ndarray = found.cpu().numpy()
        return logprobs

    def _ended(self, drawing: np.ndarray | slice, tokens: np.ndarray) -> list[tuple[int, str]]:
        """Slots whose response ends with these tokens, and why."""
        work, slots = self._work, np.arange(len(self._work))[drawing]
        eos, stop = tokens == self.eos_id, np.zeros(len(tokens), dtype=bool)
        for token in self.stops.ids:
            stop |= tokens == token
        if self.stops.strings:
            stop |= [self._completes_a_stop(slot) for slot in slots.tolist()]
        done = eos | stop | (work.counts[drawing] >= work.limits[drawing])
        return [
            (int(slots[i]), "eos" if eos[i] else "stop" if stop[i] else "length")
            for i in np.flatnonzero(done)
        ]

    def _generated(self, slot: int, reason: str) -> Generated:
        """A slot's response, as it stands."""
        work, count = self._work, self._work.counts[slot]
        whole = work.unfiltered
        return Generated(
            rollout_id=work.requests[slot].rollout_id,
            response_ids=work.tokens[slot, :count].tolist(),
            logprobs=work.logprobs[slot, :count].tolist(),
            unfiltered=None if whole is None else whole[slot, :count].tolist(),
            finish_reason=reason,
        )

    def _completes_a_stop(self, slot: int) -> bool:
        count = int(self._work.counts[slot])
        # Every token is at least a byte of the string that the last one completes.
        tail = self._work.tokens[slot, max(0, count - self._reach) : count].tolist()
        return count >= self.min_tokens and self._stop_at(tail) is not None

    def _stop_at(self, ids: Sequence[int]) -> int | None:
        """Where in the text the stop string begins that the last token completes, if one does."""
        text, before = self.stops.decode(ids), len(self.stops.decode(ids[:-1]))
        # A character cut in two counts as up to three before it is whole.
        found = [text.find(s, max(0, before - len(s) - 3)) for s in self.stops.strings]
        return min((at for at in found if at >= 0), default=None)

    def _free(self, slots: Sequence[int]) -> None:
        """Empty slots; the last in use move into them, so that slots in use stay together."""
        for slot in sorted(slots, reverse=True):
            last = len(self._work) - 1
            if self._work.remove(slot):
                self.cached.move(last, slot, int(self._work.filled[slot]))
