"""Generation: a lease of prompts in, sampled responses with exact log-probabilities out.

`Engine.generate` takes a lease as one batch: prefill, then one token per row and step through
the KV cache. Rows that end leave the batch, so that no step is spent on them. A lease is the unit
of batching, so its result is a function of the lease and the weights alone: not of the actor
it ran on, nor of what else is running (invariant I5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.logprobs import Sampling, draw, sampling_logprobs, uniforms
from common.palm import KVCache, PaLM
from common.trajectory import RolloutRequest

# Rows are only dropped from the cache when this share of them has ended: each drop copies it.
_COMPACT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What the engine made of one request."""

    response_ids: list[int]
    """EOS included when it was sampled."""
    logprobs: list[float]
    """float32 log-probability of each token when it was drawn."""
    finish_reason: str
    """``eos`` or ``length``."""


class Engine:
    """Samples from a frozen policy."""

    def __init__(self, palm: PaLM, *, eos_id: int, sampling: Sampling, max_tokens: int) -> None:
        self.palm = palm
        self.eos_id = eos_id
        self.sampling = sampling
        self.max_tokens = max_tokens

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest]) -> list[Generated]:
        """Sample one response per request; results in the requests' order.

        Raises:
            ValueError: no requests, an empty prompt, or one that leaves no room for a response.
        """
        tokens_BT, lengths_B = self._pad(requests)
        cache = KVCache(
            self.palm.config,
            len(requests),
            tokens_BT.shape[1] + self.max_tokens,
            self.palm.embedding.weight,
        )
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        rows = torch.arange(len(requests))
        """Row of the cache -> index of the request."""
        ended = torch.zeros(len(requests), dtype=torch.bool)
        logits_BV = self.palm.prefill(tokens_BT, lengths_B, cache)
        for position in range(self.max_tokens):
            logprobs_BV = sampling_logprobs(logits_BV, self.sampling)
            at = np.full(len(rows), position, dtype=np.uint64)
            chosen_B = draw(logprobs_BV, uniforms(seeds[rows.numpy()], at))
            drawn_B = logprobs_BV.gather(-1, chosen_B[:, None]).squeeze(-1)
            for row, (token, logprob) in enumerate(
                zip(chosen_B.tolist(), drawn_B.tolist(), strict=True)
            ):
                if not ended[row]:
                    ids[rows[row]].append(token)
                    logprobs[rows[row]].append(logprob)
            ended = ended | (chosen_B.cpu() == self.eos_id)
            if bool(ended.all()) or position + 1 == self.max_tokens:
                break
            if float(ended.float().mean()) > _COMPACT_SHARE:
                alive = (~ended).nonzero().squeeze(-1)
                cache.select(alive.to(cache.keys.device))
                rows, chosen_B, ended = rows[alive], chosen_B[alive], ended[alive]
            logits_BV = self.palm.decode(chosen_B, cache)
        return [
            Generated(
                response_ids=tokens,
                logprobs=chosen,
                finish_reason="eos" if tokens[-1] == self.eos_id else "length",
            )
            for tokens, chosen in zip(ids, logprobs, strict=True)
        ]

    def _pad(self, requests: Sequence[RolloutRequest]) -> tuple[Tensor, Tensor]:
        if not requests:
            raise ValueError("nothing to generate")
        lengths = [len(request.prompt_ids) for request in requests]
        room = self.palm.config.context - self.max_tokens
        for request, length in zip(requests, lengths, strict=True):
            if not 0 < length <= room:
                raise ValueError(
                    f"rollout {request.rollout_id}: prompt of {length} tokens; 1 to {room} fit"
                )
        device = self.palm.embedding.weight.device
        tokens_BT = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
        for row, request in enumerate(requests):
            tokens_BT[row, : lengths[row]] = torch.tensor(request.prompt_ids)
        return tokens_BT.to(device), torch.tensor(lengths, device=device)
