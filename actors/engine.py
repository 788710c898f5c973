"""Generation: prompts in, sampled responses with exact log-probabilities out.

Continuous batching over a fixed set of slots: a response that ends frees its slot at once for the
next request, whatever its length; prompts are prefilled in chunks beside running decodes, so that a
long one does not stall the others; samples of one prompt prefill it once.

`generate` runs a lease to its end, so that its result is a function of the lease and the weights
alone: not of the actor it ran on, nor of what else is running (invariant I5). `submit`, `step` and
`cancel` are the same loop, opened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from actors.decoder import Choice, Decoder
from actors.step import Chunk, Copy
from common.logprobs import Sampling, draw, sampling_logits, uniforms
from common.palm import PaLM
from common.trajectory import RolloutRequest

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


@dataclass(slots=True, kw_only=True)
class _Job:
    """A request in a slot, or waiting for one."""

    request: RolloutRequest
    limit: int
    """Longest response."""
    uniforms: np.ndarray
    filled: int = 0
    """Positions in the cache."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt_ids


class Engine:
    """Samples from a frozen policy."""

    def __init__(
        self,
        palm: PaLM,
        *,
        eos_id: int,
        sampling: Sampling,
        max_tokens: int,
        slots: int = 128,
        prefill_tokens: int = 1024,
        stops: Stops | None = None,
        kernels: Choice = "auto",
    ) -> None:
        """Runs in the dtype and on the device of `palm`'s parameters.

        Args:
            max_tokens: longest response, when a request does not name its own.
            slots: sequences in work at once; the cache holds each in a full context.
            prefill_tokens: prompt tokens that one step may compute beside its decodes.

        Raises:
            ValueError: a size under 1.
            ClusterError: native kernels were asked for and cannot be had.
        """
        if min(max_tokens, slots, prefill_tokens) < 1:
            raise ValueError("max_tokens, slots and prefill_tokens must be at least 1")
        self.palm = palm
        self.decoder = Decoder(palm, slots=slots, kernels=kernels)
        self.eos_id = eos_id
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.min_tokens = sampling.min_tokens
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.stops = stops or Stops()
        self._plain = sampling == Sampling(temperature=sampling.temperature or 1.0)
        """Nothing but a temperature: the kernels' own draw will do."""
        self._reach = max((len(s.encode()) for s in self.stops.strings), default=0)
        self._queue: deque[_Job] = deque()
        self._active: list[_Job] = []
        """Slot -> job; slots in use are 0 .. S - 1."""
        self._prompts = np.zeros((slots, palm.config.context), dtype=np.int32)
        """Prompts in the slots, for the search of common prefixes."""

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in work."""
        return not self._queue and not self._active

    def refresh(self) -> None:
        """Take over the weights that `palm` holds now.

        Raises:
            ValueError: responses are in work; each must come from one version.
        """
        if not self.idle:
            raise ValueError("weights cannot change under responses in work")
        self.decoder.refresh()

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
                1, or a rollout_id that is here already. Nothing is queued then.
        """
        known = {job.request.rollout_id for job in (*self._queue, *self._active)}
        jobs = []
        for request, limit in zip(
            requests, limits or [self.max_tokens] * len(requests), strict=True
        ):
            room, length = self.palm.config.context - limit, len(request.prompt_ids)
            if limit < 1:
                raise ValueError(f"rollout {request.rollout_id}: a response needs at least 1 token")
            if not 0 < length <= room:
                raise ValueError(
                    f"rollout {request.rollout_id}: prompt of {length} tokens; 1 to {room} fit"
                )
            if request.rollout_id in known:
                raise ValueError(f"rollout {request.rollout_id} is here already")
            known.add(request.rollout_id)
            seeds = np.full(limit, request.seed, dtype=np.uint64)
            drawn = uniforms(seeds, np.arange(limit, dtype=np.uint64)).numpy()
            jobs.append(_Job(request=request, limit=limit, uniforms=drawn))
        self._queue += jobs

    def text(self, made: Generated) -> str:
        """The response in words, without the stop string that ended it."""
        text = self.stops.decode(made.response_ids)
        at = self._stop_at(made.response_ids) if made.finish_reason == "stop" else None
        return text[:at]

    def cancel(self, rollout_id: str) -> bool:
        """Forget a request, waiting or in work; False when it is not here."""
        for job in self._queue:
            if job.request.rollout_id == rollout_id:
                self._queue.remove(job)
                return True
        for slot, job in enumerate(self._active):
            if job.request.rollout_id == rollout_id:
                self._free([slot])
                return True
        return False

    def step(self) -> list[Generated]:
        """Advance every slot by a token, and prompts by a chunk; what has ended."""
        newest, chunks, copies = self._plan()
        if not newest:
            return []
        positions = [job.filled - 1 for job in self._active]
        logits_SV = self.decoder.forward(newest, positions, chunks, copies)
        drawing = [s for s, job in enumerate(self._active) if job.filled >= len(job.prompt)]
        if len(drawing) < len(self._active):
            logits_SV = logits_SV[drawing]
        if not drawing:
            return []
        tokens, logprobs = self._draw(logits_SV, [self._active[slot] for slot in drawing])
        ended = []
        for slot, token, logprob in zip(drawing, tokens, logprobs, strict=True):
            job = self._active[slot]
            job.ids.append(token)
            job.logprobs.append(logprob)
            if reason := self._finish(job, token):
                ended.append((slot, reason))
        made = [
            Generated(
                rollout_id=self._active[slot].request.rollout_id,
                response_ids=self._active[slot].ids,
                logprobs=self._active[slot].logprobs,
                finish_reason=reason,
            )
            for slot, reason in ended
        ]
        self._free([slot for slot, _ in ended])
        return made

    # ------------------------------------------------------------------ parts of a step

    def _plan(self) -> tuple[list[int], list[Chunk], list[Copy]]:
        """This step's newest token of every slot, and the prompt tokens before it.

        A prompt that does not fit into the step's budget ends the plan, so at most one is ever
        in the middle of its prefill, and every prefix of another slot is whole after this step.
        """
        budget = self.prefill_tokens
        newest: list[int] = []
        chunks: list[Chunk] = []
        copies: list[Copy] = []
        for slot, job in enumerate(self._active):
            if job.ids:
                newest.append(job.ids[-1])
                job.filled += 1
            else:
                budget -= self._prefill(slot, job, budget, newest, chunks)
        while self._queue and len(self._active) < self.slots and budget > 0:
            job, slot = self._queue.popleft(), len(self._active)
            self._share(slot, job, copies)
            self._prompts[slot, : len(job.prompt)] = job.prompt
            self._active.append(job)
            budget -= self._prefill(slot, job, budget, newest, chunks)
        return newest, chunks, copies

    def _prefill(
        self, slot: int, job: _Job, budget: int, newest: list[int], chunks: list[Chunk]
    ) -> int:
        """Plan the next tokens of a prompt; how many."""
        start = job.filled
        job.filled = min(len(job.prompt), start + max(1, budget))
        newest.append(job.prompt[job.filled - 1])
        if job.filled - start > 1:
            part = job.prompt[start : job.filled - 1]
            chunks.append(Chunk(slot=slot, start=start, tokens=part))
        return job.filled - start

    def _share(self, slot: int, job: _Job, copies: list[Copy]) -> None:
        """Take over what another slot's prompt has in common with this one.

        The last token is always computed: its logits are wanted.
        """
        if not slot:
            return
        wanted = np.array(job.prompt[:-1], dtype=np.int32)
        same = (self._prompts[:slot, : len(wanted)] == wanted).cumprod(axis=1).sum(axis=1)
        lengths = np.array([min(len(other.prompt), other.filled) for other in self._active])
        same = np.minimum(same, lengths)
        source = int(same.argmax())
        if same[source] >= _WORTH_SHARING:
            job.filled = int(same[source])
            last = copies[-1] if copies else None
            if last and (last.source, last.positions) == (source, job.filled):
                copies[-1] = Copy(
                    source=source, targets=[*last.targets, slot], positions=job.filled
                )
            else:
                copies.append(Copy(source=source, targets=[slot], positions=job.filled))

    def _draw(self, logits: Tensor, jobs: Sequence[_Job]) -> tuple[list[int], list[float]]:
        """One token for each job, and its log-probability."""
        at = [len(job.ids) for job in jobs]
        u = np.array([job.uniforms[place] for job, place in zip(jobs, at, strict=True)])
        uniforms_B = torch.from_numpy(u).to(logits.device)
        if self._plain:
            tokens, logprobs = self.decoder.kernels.draw(logits, self.sampling, uniforms_B)
        else:
            positions = torch.tensor(at, device=logits.device)
            kept = sampling_logits(logits, self.sampling, positions=positions)
            tokens, logprobs = draw(kept, uniforms_B)
        return tokens.tolist(), logprobs.tolist()

    def _finish(self, job: _Job, token: int) -> str:
        """Why the response ends with this token; empty when it goes on."""
        if token == self.eos_id:
            return "eos"
        if token in self.stops.ids:
            return "stop"
        if self.stops.strings:
            # Every token is at least a byte of the string that the last one completes.
            tail = job.ids[-self._reach :]
            if len(job.ids) >= self.min_tokens and self._stop_at(tail) is not None:
                return "stop"
        return "length" if len(job.ids) >= job.limit else ""

    def _stop_at(self, ids: Sequence[int]) -> int | None:
        """Where in the text the stop string begins that the last token completes, if one does."""
        text, before = self.stops.decode(ids), len(self.stops.decode(ids[:-1]))
        # A character cut in two counts as up to three before it is whole.
        found = [text.find(s, max(0, before - len(s) - 3)) for s in self.stops.strings]
        return min((at for at in found if at >= 0), default=None)

    def _free(self, slots: Sequence[int]) -> None:
        """Empty slots; the last in use move into them, so that slots in use stay together."""
        for slot in sorted(slots, reverse=True):
            last = len(self._active) - 1
            if slot != last:
                self._active[slot] = self._active[last]
                self._prompts[slot] = self._prompts[last]
                self.decoder.move(last, slot, self._active[slot].filled)
            self._active.pop()
